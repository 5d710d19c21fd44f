"""What agfsync is measured against, in a process of its own (benches/_processes.py)."""

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.benches._processes import HostMemory, processor_name


class _Torch:
    """What the peers share: torch, on the GPU where there is one."""

    libraries = ("torch", "diffusers")

    def __init__(self):
        # OpenMP's waiting threads sleep, as XLA's do: spinning, they lose much time wherever
        # another program wants the cores too. It is read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        self._cuda = torch.cuda.is_available()
        self._device = "cuda" if self._cuda else "cpu"
        torch.ones(1).sum()

    def _wait(self) -> None:
        """Until the GPU has done all that it was given."""
        import torch

        if self._cuda:
            torch.cuda.synchronize()

    def _peak_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self._cuda else self._memory.peak()

    def about(self) -> dict[str, Any]:
        import torch

        return {
            "device": torch.cuda.get_device_name() if self._cuda else processor_name(),
            "versions": {name: version(name) for name in self.libraries},
        }


class Diffusers(_Torch):
    """Its pipeline.

    Set up as it runs fastest: channels last, torch.compile on a GPU; attention is torch's
    scaled_dot_product_attention anyway.
    """

    def __init__(self):
        super().__init__()
        import diffusers
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
        scheduler, variant = options.pop("scheduler")
        scheduler = getattr(diffusers, scheduler)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **variant)
        pipeline.set_progress_bar_config(disable=True)
        del options["sampler"], options["batch_size"]  # of the scheduler, and of the prompts
        self._options = options
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
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
        self._step()  # the system may have laid pages aside while the other side drew
        self._wait()
        start = time.perf_counter()
        self._draw(prompts, seed)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        self._step()
        self._wait()
        step_seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "step_seconds": step_seconds,
            "peak_bytes": self._peak_bytes(),
        }

    def _draw(self, prompts: Sequence[str], seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._pipeline(list(prompts), generator=generator, output_type="np", **self._options)


class Reference(_Torch):
    """transformers in the procedure of the released code of AGFSync and TIFA.

    One image and one question a call: the image is prepared and read anew for each question, and
    `generate` writes the answer. CLIP and the aesthetic head: a call an image each.
    """

    libraries = ("torch", "transformers")

    def __init__(self):
        super().__init__()
        import torch
        import transformers
        from transformers import (  # noqa: F401 - imports are not measured
            Blip2ForConditionalGeneration,
            Blip2Processor,
            CLIPModel,
            CLIPProcessor,
        )

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        torch.set_grad_enabled(False)

    def load(self, specs: Mapping[str, dict], batch_size: int) -> None:
        """`batch_size` is not theirs: they have none."""
        import torch
        from transformers import (
            Blip2ForConditionalGeneration,
            Blip2Processor,
            CLIPModel,
            CLIPProcessor,
        )

        self._memory = HostMemory()

        def made(model: Any, spec: Mapping[str, Any]) -> Any:
            dtype = getattr(torch, spec.get("dtype", "float32"))
            return model.from_pretrained(spec["folder"], dtype=dtype).eval().to(self._device)

        self._models, self._processors = {}, {}
        for name, spec in specs.items():
            model, processor = CLIPModel, CLIPProcessor
            if name == "vqa":
                model, processor = Blip2ForConditionalGeneration, Blip2Processor
            self._models[name] = made(model, spec)
            self._processors[name] = processor.from_pretrained(spec["folder"])
            if name == "aesthetic":
                self._head = _aesthetic_head(spec["head_file"]).to(self._device)

    def score(
        self,
        parts: Sequence[str],
        images: np.ndarray,
        prompts: Sequence[str],
        questions: Sequence[Sequence[Mapping]],
    ) -> dict[str, Any]:
        """Seconds, peak memory so far and, a scorer, answers or scores."""
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        columns: dict[str, Any] = {}
        start = time.perf_counter()
        for name in parts:
            model, processor = self._models[name], self._processors[name]

            def ready(inputs, model=model):
                return inputs.to(self._device, model.dtype)

            if name == "vqa":
                columns[name] = [
                    [self._answer(model, processor, ready, image, row["text"]) for row in asked]
                    for image, asked in zip(pictures, questions, strict=True)
                ]
                continue
            columns[name] = []
            for image, prompt in zip(pictures, prompts, strict=True):
                if name == "clip":
                    inputs = processor(
                        text=[prompt],
                        images=image,
                        return_tensors="pt",
                        padding=True,
                        truncation=True,
                    )
                    score = model(**ready(inputs)).logits_per_image
                    # a score is 100 cosines, whatever the model's own scale is
                    score = score * 100 / model.logit_scale.exp()
                else:
                    inputs = ready(processor(images=image, return_tensors="pt"))
                    features = model.get_image_features(**inputs)
                    features = getattr(features, "pooler_output", features).float()
                    score = self._head(features / features.norm(dim=-1, keepdim=True))
                columns[name].append(float(score))
        self._wait()
        seconds = time.perf_counter() - start
        columns = {name: np.array(values) for name, values in columns.items()}
        return {"seconds": seconds, "peak_bytes": self._peak_bytes(), "columns": columns}

    def _answer(self, model, processor, ready, image, text: str) -> str:
        inputs = ready(processor(images=image, text=text, return_tensors="pt"))
        made = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=10)
        return processor.batch_decode(made, skip_special_tokens=True)[0].strip()


def _aesthetic_head(file: str) -> Any:
    """The LAION predictor's linear layers, one after the other."""
    import torch
    from safetensors.torch import load_file

    state = (
        load_file(file)
        if file.endswith(".safetensors")
        else torch.load(file, map_location="cpu", weights_only=True)
    )
    numbers = sorted({int(key.split(".")[1]) for key in state})
    layers = []
    for number in numbers:
        weight = state[f"layers.{number}.weight"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": state[f"layers.{number}.bias"]})
        layers.append(layer)
    return torch.nn.Sequential(*layers)


SIDES = ("chosen", "rejected")


def random_batch(
    shapes: Mapping[str, tuple[int, ...]], size: int, seed: int
) -> dict[str, np.ndarray]:
    """Latents [b, h, w, c] of both sides of pairs, and their conditioning; the same everywhere."""
    rng = np.random.default_rng(seed)
    made = {
        f"{side}_latents": rng.standard_normal((size, *shapes["latents"]), np.float32)
        for side in SIDES
    }
    for name, shape in shapes.items():
        if name != "latents":
            made[name] = rng.standard_normal((size, *shape), np.float32)
    return made


class TorchTraining(_Torch):
    """Diffusion-DPO with diffusers' UNet, as its training scripts write a step.

    Chosen and rejected go through the networks as one batch, with the same noise; the reference
    without gradients; LoRA by PEFT, whose reference is the network with the adapters off. On a GPU
    under autocast and torch.compile. Weights are float32, as ours.
    """

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DConditionModel  # noqa: F401 - imports are not measured

    def load(self, folder: Path, dtype: str, settings: Mapping[str, Any]) -> None:
        import copy

        import torch
        from diffusers import DDPMScheduler, UNet2DConditionModel

        self._memory = HostMemory()
        self._dtype = getattr(torch, dtype)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
        unet.to(self._device, memory_format=torch.channels_last).train()
        self._rank = settings["lora_rank"]
        if self._rank:
            from peft import LoraConfig

            unet.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=self._rank, target_modules=targets))
            self._reference = None
        else:
            # At the precision of the computation, as ours.
            self._reference = copy.deepcopy(unet).to(self._dtype).requires_grad_(False)
        if settings["remat"] != "none":
            unet.enable_gradient_checkpointing()
        self._unet = unet
        self._noise = DDPMScheduler.from_pretrained(folder / "scheduler")

    def prepare(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> float:
        import torch

        self._shapes, self._size = shapes, config["bench"]["batch_size"]
        spec = config["train"]
        self._beta = config["loss"]["beta"] or 2000.0
        self._clip = spec["max_grad_norm"]
        self._trained = [p for p in self._unet.parameters() if p.requires_grad]
        self._adamw = torch.optim.AdamW(
            self._trained,
            lr=spec["learning_rate"],
            weight_decay=spec["weight_decay"],
            fused=True,
        )
        self._run = torch.compile(self._unet) if self._cuda else self._unet
        self._alphas = self._noise.alphas_cumprod.to(self._device)
        return self.train(0, 1)["seconds"]

    def train(self, turn: int, num_steps: int) -> dict[str, float]:
        """Seconds of some steps, the last one's loss, peak memory so far."""
        batches = [self._batch(turn * num_steps + i) for i in range(num_steps)]
        self._wait()
        start = time.perf_counter()
        for batch in batches:
            loss = self._step(*batch)
        loss = float(loss)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": loss, "peak_bytes": self._peak_bytes()}

    def _batch(self, seed: int) -> tuple[Any, dict[str, Any]]:
        import torch

        arrays = {
            name: torch.from_numpy(value).to(self._device)
            for name, value in random_batch(self._shapes, self._size, seed).items()
        }
        latents = torch.cat([arrays.pop(f"{side}_latents") for side in SIDES])
        latents = latents.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        twice = {name: torch.cat([value, value]) for name, value in arrays.items()}
        given = {"encoder_hidden_states": twice.pop("encoder_hidden_states")}
        if twice:  # SDXL's pooled text, beside the size of the images, which are not cropped
            height, width = (8 * side for side in self._shapes["latents"][:2])
            sizes = [height, width, 0, 0, height, width]
            times = torch.tensor([sizes] * len(latents), device=self._device)
            given["added_cond_kwargs"] = twice | {"time_ids": times}
        return latents, given

    def _step(self, latents: Any, given: dict[str, Any]) -> Any:
        import contextlib

        import torch
        import torch.nn.functional as F

        noise = torch.randn_like(latents[: self._size]).repeat(2, 1, 1, 1)
        times = torch.randint(0, len(self._alphas), (self._size,), device=self._device).repeat(2)
        alpha = self._alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        velocity = self._noise.config.prediction_type == "v_prediction"
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents if velocity else noise

        def errors(network):
            prediction = network(noisy, times, **given).sample.float()
            error = (prediction - target).pow(2).mean(dim=(1, 2, 3))
            return error[: self._size] - error[self._size :]

        half = self._dtype != torch.float32
        cast = torch.autocast(self._device, self._dtype) if half else contextlib.nullcontext()
        with cast:
            with torch.no_grad():
                if self._reference is None:
                    self._unet.disable_adapters()
                reference = errors(self._reference or self._run)
                if self._reference is None:
                    self._unet.enable_adapters()
            gap = errors(self._run)
        loss = -F.logsigmoid(-self._beta / 2 * (gap - reference)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._adamw.step()
        self._adamw.zero_grad()
        return loss
