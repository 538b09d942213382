"""onnxruntime as it looks on a machine with a GPU: its sessions claim the provider asked for and compute on the CPU."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
import pytest

LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=host ; file=/src/gemm.cc ; line=1"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


class FakeGpu:
    """Installed by the fixture `gpu`.

    Attributes
    ----------
    providers : what the package was built with
    works : whether a session that asks for the GPU gets it
    failure : the text of the error that every run on the GPU ends with, empty for runs that succeed
    refusal : likewise for the loading of a model with CUDA graphs
    opened : the providers and options of every session, in order, the probes' too
    graph_ids : of each bound run on the GPU, the CUDA graph it asked for
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.providers, self.works = [TENSORRT, CUDA, CPU], True
        self.failure = self.refusal = ""
        self.opened: list[list[tuple[str, dict[str, str]]]] = []
        self.graph_ids: list[str] = []
        gpu, real = self, ort.InferenceSession

        class Session(real):  # type: ignore[misc, valid-type]
            def __init__(self, model: bytes, options: Any, providers: Any, enable_fallback: bool) -> None:
                assert not enable_fallback  # or the runtime tries the CPU in silence
                gpu.opened.append(providers)
                if gpu.refusal and "enable_cuda_graph" in providers[0][1]:
                    raise RuntimeError(gpu.refusal)
                self._claims = providers[0][0] if gpu.works else CPU
                super().__init__(model, options, providers=[CPU], enable_fallback=enable_fallback)

            def get_providers(self) -> list[str]:
                return list(dict.fromkeys([self._claims, CPU]))

            def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
                if self._claims != CPU:
                    gpu.graph_ids.append(options.get_run_config_entry("gpu_graph_id") if options else "")
                    if gpu.failure:
                        raise RuntimeError(gpu.failure)
                super().run_with_iobinding(binding, options)

        monkeypatch.setattr(ort, "InferenceSession", Session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: self.providers)
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        allocate = ort.OrtValue.ortvalue_from_shape_and_type
        monkeypatch.setattr(
            ort.OrtValue, "ortvalue_from_shape_and_type", lambda shape, element, *_: allocate(shape, element)
        )

    @property
    def last_opened(self) -> tuple[str, dict[str, str]]:
        """The first provider of the newest session."""
        return self.opened[-1][0]
