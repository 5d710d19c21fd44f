"""What agfsync is measured against, in a process of its own (utils/processes.py)."""

import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agfsync_jax.utils.processes import HostMemory, processor_name


class Diffusers:
    """Its pipeline, on the GPU where there is one.

    Set up as it runs fastest: channels last, torch.compile on a GPU; attention is torch's
    scaled_dot_product_attention anyway.
    """

    def __init__(self):
        # OpenMP's waiting threads sleep, as XLA's do: spinning, they lose much time wherever
        # another program wants the cores too. It is read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import diffusers
        import torch
        import transformers
        from diffusers import (  # noqa: F401 - imports are not measured
            AutoencoderKL,
            StableDiffusionPipeline,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )
        from transformers import (  # noqa: F401
            CLIPTextModel,
            CLIPTextModelWithProjection,
            CLIPTokenizer,
        )

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        torch.ones(1).sum()

    def load(self, folder: Path, dtype: str) -> dict[str, float]:
        import torch
        from diffusers import DiffusionPipeline

        self._memory = HostMemory()
        start = time.perf_counter()
        self._pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
        parts = self._pipeline.components.values()
        networks = [part for part in parts if isinstance(part, torch.nn.Module)]
        values = [value.detach() for network in networks for value in network.parameters()]
        # A mapped file is in memory once its pages are touched, as the first image would.
        sum(float(value.view(-1)[:: 4096 // value.element_size()].sum()) for value in values)
        seconds = time.perf_counter() - start
        held = sum(value.numel() * value.element_size() for value in values)
        return {"seconds": seconds, "held_bytes": held, "peak_bytes": self._memory.peak()}

    def prepare(self, prompts: Sequence[str], drawing: dict[str, Any]) -> float:
        """Sets up all that makes the pipeline fast; seconds of the first batch."""
        import diffusers
        import torch

        options, pipeline = dict(drawing), self._pipeline
        scheduler = getattr(diffusers, options.pop("scheduler"))
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        del options["sampler"], options["batch_size"]  # of the scheduler, and of the prompts
        self._options = options
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            pipeline.to("cuda")
            pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
            pipeline.vae.decode = torch.compile(
                pipeline.vae.decode, mode="max-autotune", fullgraph=True
            )
        # The denoiser's last call of the first batch is what `draw` repeats.
        calls = []
        keep = pipeline.unet.register_forward_pre_hook(
            lambda _, *call: calls.append(call), with_kwargs=True
        )
        start = time.perf_counter()
        self._draw(prompts, 0)
        seconds = time.perf_counter() - start
        keep.remove()
        args, kwargs = calls[-1]
        self._step = torch.no_grad()(lambda: pipeline.unet(*args, **kwargs))
        self._step()
        for _ in range(2 if self._cuda else 0):  # torch records CUDA graphs in further calls
            self._draw(prompts, 0)
        return seconds

    def draw(self, prompts: Sequence[str], seed: int) -> dict[str, float]:
        import torch

        self._step()  # the system may have laid pages aside while the other side drew
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._draw(prompts, seed)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        self._step()
        if self._cuda:
            torch.cuda.synchronize()
        step_seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self._cuda else self._memory.peak()
        return {"seconds": seconds, "step_seconds": step_seconds, "peak_bytes": peak}

    def _draw(self, prompts: Sequence[str], seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._pipeline(list(prompts), generator=generator, output_type="np", **self._options)

    def about(self) -> dict[str, Any]:
        import torch

        cuda = torch.cuda.is_available()
        return {
            "device": torch.cuda.get_device_name() if cuda else processor_name(),
            "versions": {name: version(name) for name in ("torch", "diffusers")},
        }
