"""The Python clients: fit, compare and activate calibrators, and ask for calibrated probabilities.

    with Client("127.0.0.1:8001") as client:
        revision = client.fit("magika", "temperature", inputs=inputs, labels=labels)
        client.activate("magika", revision.revision)

    async with AsyncClient("127.0.0.1:8001") as client:
        prediction = await client.predict("magika", inputs)

Both work in one process with tritonclient: the messages of package `inference` are in a private descriptor pool.
Failures are the classes of `service.errors`, as on the server.
"""

from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.failures import Retries
from service.client.monitors import Alarm, Cause, Monitor, MonitorReport, Nowcast
from service.client.requests import Inputs
from service.client.results import (
    Evaluation,
    KeptState,
    Model,
    OnlineState,
    Prediction,
    Replay,
    Revision,
    Shadow,
    StoredPrediction,
)
from service.client.stream import Stream

__all__ = [
    "Alarm",
    "AsyncClient",
    "Cause",
    "Client",
    "Evaluation",
    "Inputs",
    "KeptState",
    "Model",
    "Monitor",
    "MonitorReport",
    "Nowcast",
    "OnlineState",
    "Prediction",
    "Replay",
    "Retries",
    "Revision",
    "Shadow",
    "StoredPrediction",
    "Stream",
]
