"""The models: sessions of the runtime, the model repository, and what serves a model now."""
