"""When the probabilities stop being true: detectors, what they say, the monitors that feed them, their alarms."""
