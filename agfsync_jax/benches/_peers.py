"""What agfsync is measured against, in a process of its own (benches/_processes.py)."""

import contextlib
import copy
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.benches._processes import HostMemory, processor_name
from agfsync_jax.benches._sides import PAIR, Batch, Drawing, Side, Training


class _Torch(Side):
    """What the peers share: torch, on the GPU where there is one.

    Attributes:
        imported: "library:name" of what is needed besides, imported before it is measured.
    """

    libraries = ("torch", "diffusers")
    imported: tuple[str, ...] = ()

    def __init__(self):
        # OpenMP's waiting threads sleep, as XLA's do: spinning, they lose much time wherever
        # another program wants the cores too. It is read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        self._torch, self._cuda = torch, torch.cuda.is_available()
        self._device = "cuda" if self._cuda else "cpu"
        torch.ones(1).sum()
        for name in (*self.libraries, *self.imported):
            pkgutil.resolve_name(name)
        for library in {"diffusers", "transformers"} & sys.modules.keys():
            logging = sys.modules[library].utils.logging
            logging.disable_progress_bar()
            logging.set_verbosity_error()

    def device_name(self) -> str:
        return self._torch.cuda.get_device_name() if self._cuda else processor_name()

    def peak_bytes(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self._cuda else self.memory.peak()

    def wait(self) -> None:
        if self._cuda:
            self._torch.cuda.synchronize()


class Diffusers(_Torch, Drawing):
    """Its pipeline.

    Set up as it runs fastest: channels last, torch.compile on a GPU; attention is torch's
    scaled_dot_product_attention anyway.
    """

    imported = (
        *("diffusers:AutoencoderKL", "diffusers:UNet2DConditionModel"),
        *("diffusers:StableDiffusionPipeline", "diffusers:StableDiffusionXLPipeline"),
        *("transformers:CLIPTextModel", "transformers:CLIPTextModelWithProjection"),
        "transformers:CLIPTokenizer",
    )

    def load(self, folder: Path, dtype: str) -> dict[str, float]:
        import torch
        from diffusers import DiffusionPipeline

        self.memory = HostMemory()

        def load():
            made = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
            networks = [n for n in made.components.values() if isinstance(n, torch.nn.Module)]
            values = [value.detach() for network in networks for value in network.parameters()]
            # A mapped file is in memory once its pages are touched, as the first image would.
            sum(float(value.view(-1)[:: 4096 // value.element_size()].sum()) for value in values)
            return made, values

        seconds, (self._pipeline, values) = self.timed(load)
        held = sum(value.numel() * value.element_size() for value in values)
        return {"seconds": seconds, "held_bytes": held, "peak_bytes": self.memory.peak()}

    def prepare(
        self, prompts: Sequence[str], drawing: dict[str, Any], scheduler: tuple[str, dict]
    ) -> float:
        """Sets up all that makes the pipeline fast; seconds of the first batch."""
        import diffusers
        import torch

        self._options, pipeline = drawing, self._pipeline
        name, variant = scheduler
        pipeline.scheduler = getattr(diffusers, name).from_config(
            pipeline.scheduler.config, **variant
        )
        pipeline.set_progress_bar_config(disable=True)
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
        if self._cuda:
            pipeline.to("cuda")
            compiled = {"mode": "max-autotune", "fullgraph": True}
            pipeline.unet = torch.compile(pipeline.unet, **compiled)
            pipeline.vae.decode = torch.compile(pipeline.vae.decode, **compiled)
        # The denoiser's last call of the first batch is what `draw` repeats.
        calls = []
        keep = pipeline.unet.register_forward_pre_hook(
            lambda _, *call: calls.append(call), with_kwargs=True
        )
        seconds, _ = self.timed(self._draw, prompts, 0)
        keep.remove()
        args, kwargs = calls[-1]
        self._step = torch.no_grad()(lambda: pipeline.unet(*args, **kwargs))
        self._step()
        for _ in range(2 if self._cuda else 0):  # torch records CUDA graphs in further calls
            self._draw(prompts, 0)
        return seconds

    def _draw(self, prompts: Sequence[str], seed: int) -> None:
        generator = self._torch.Generator().manual_seed(seed)
        self._pipeline(list(prompts), generator=generator, output_type="np", **self._options)


class Reference(_Torch):
    """transformers in the procedure of the released code of AGFSync and TIFA.

    One image and one question a call: the image is prepared and read anew for each question, and
    `generate` writes the answer. CLIP and the aesthetic head: a call an image each.
    """

    libraries = ("torch", "transformers")
    classes = {
        "vqa": ("Blip2ForConditionalGeneration", "Blip2Processor"),
        "clip": ("CLIPModel", "CLIPProcessor"),
        "aesthetic": ("CLIPModel", "CLIPProcessor"),
    }

    def load(self, specs: Mapping[str, dict], batch_size: int) -> None:
        """`batch_size` is not theirs: they have none."""
        import torch
        import transformers
        from safetensors.torch import load_file

        torch.set_grad_enabled(False)
        classes = {name: [getattr(transformers, c) for c in self.classes[name]] for name in specs}
        self.memory = HostMemory()
        self._models, self._processors = {}, {}
        for name, spec in specs.items():
            model, processor = classes[name]
            dtype = getattr(torch, spec.get("dtype", "float32"))
            made = model.from_pretrained(spec["folder"], dtype=dtype)
            self._models[name] = made.eval().to(self._device)
            self._processors[name] = processor.from_pretrained(spec["folder"])
        if file := specs.get("aesthetic", {}).get("head_file"):
            pickled = {"map_location": "cpu", "weights_only": True}
            safe = file.endswith(".safetensors")
            state = load_file(file) if safe else torch.load(file, **pickled)
            state = {key: value.to(self._device, torch.float32) for key, value in state.items()}
            numbers = sorted({int(key.split(".")[1]) for key in state})
            self._head = [
                (state[f"layers.{number}.weight"], state[f"layers.{number}.bias"])
                for number in numbers  # the LAION predictor's linear layers, one after the other
            ]

    def score(self, parts: Sequence[str], batch: Batch) -> dict[str, Any]:
        """Seconds, peak memory so far and, a scorer, answers or scores."""
        from PIL import Image

        images, *texts = batch
        rows = list(zip(map(Image.fromarray, images), *texts, strict=True))
        ways = {"vqa": self._answers, "clip": self._clip, "aesthetic": self._aesthetic}
        seconds, columns = self.timed(lambda: {n: [ways[n](*row) for row in rows] for n in parts})
        columns = {name: np.array(values) for name, values in columns.items()}
        return {"seconds": seconds, "peak_bytes": self.peak_bytes(), "columns": columns}

    def _answers(self, image: Any, prompt: str, questions: Sequence[Mapping]) -> list[str]:
        processor, answers = self._processors["vqa"], []
        for row in questions:
            inputs = self._inputs("vqa", images=image, text=row["text"])
            made = self._models["vqa"].generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=10
            )
            answers.append(processor.batch_decode(made, skip_special_tokens=True)[0].strip())
        return answers

    def _clip(self, image: Any, prompt: str, questions: Sequence[Mapping]) -> float:
        model = self._models["clip"]
        texts = {"text": [prompt], "padding": True, "truncation": True}
        score = model(**self._inputs("clip", images=image, **texts)).logits_per_image
        # a score is 100 cosines, whatever the model's own scale is
        return float(score * 100 / model.logit_scale.exp())

    def _aesthetic(self, image: Any, prompt: str, questions: Sequence[Mapping]) -> float:
        inputs = self._inputs("aesthetic", images=image)
        features = self._models["aesthetic"].get_image_features(**inputs)
        features = getattr(features, "pooler_output", features).float()
        features = features / features.norm(dim=-1, keepdim=True)
        for weight, bias in self._head:
            features = self._torch.nn.functional.linear(features, weight, bias)
        return float(features)

    def _inputs(self, name: str, **given: Any) -> Any:
        made = self._processors[name](return_tensors="pt", **given)
        return made.to(self._device, self._models[name].dtype)


class TorchTraining(_Torch, Training):
    """Diffusion-DPO with diffusers' UNet, as its training scripts write a step.

    Chosen and rejected go through the networks as one batch, with the same noise; the reference
    without gradients; LoRA by PEFT, whose reference is the network with the adapters off. On a GPU
    under autocast and torch.compile. Weights are float32, as ours.
    """

    libraries = ("torch", "diffusers", "peft")

    def load(self, folder: Path, config: dict[str, Any], shapes: dict[str, tuple]) -> float:
        """Loads and compiles; seconds of the first step."""
        import torch
        from diffusers import DDPMScheduler, UNet2DConditionModel

        self.memory = HostMemory()
        spec = config["train"]
        self.shapes, self.size = shapes, config["bench"]["batch_size"]
        self._dtype = getattr(torch, config["bench"]["dtype"])
        self._unet = unet = UNet2DConditionModel.from_pretrained(
            folder / "unet", dtype=torch.float32
        )
        unet.to(self._device, memory_format=torch.channels_last).train()
        self._reference = None
        if spec["lora_rank"]:
            from peft import LoraConfig

            unet.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=spec["lora_rank"], target_modules=targets))
        else:  # at the precision of the computation, as ours
            self._reference = copy.deepcopy(unet).to(self._dtype).requires_grad_(False)
        if spec["remat"] != "none":
            unet.enable_gradient_checkpointing()
        self._beta, self._clip = (
            config["loss"].get("diffusion_dpo", {}).get("beta", 2000.0),
            spec["max_grad_norm"],
        )
        self._trained = [p for p in unet.parameters() if p.requires_grad]
        self._adamw = torch.optim.AdamW(
            self._trained,
            lr=spec["learning_rate"],
            weight_decay=spec["weight_decay"],
            fused=True,
        )
        self._run = torch.compile(unet) if self._cuda else unet
        noise = DDPMScheduler.from_pretrained(folder / "scheduler")
        self._alphas = noise.alphas_cumprod.to(self._device)
        self._velocity = noise.config.prediction_type == "v_prediction"
        return self.train(0, 1)["seconds"]

    def _batch(self, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
        import torch

        tensors = {name: torch.from_numpy(v).to(self._device) for name, v in arrays.items()}
        latents = torch.cat([tensors.pop(name) for name in PAIR])
        latents = latents.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        twice = {name: torch.cat([value, value]) for name, value in tensors.items()}
        given = {"encoder_hidden_states": twice.pop("encoder_hidden_states")}
        if twice:  # SDXL's pooled text, beside the size of the images, which are not cropped
            height, width = (8 * side for side in latents.shape[2:])
            sizes = [height, width, 0, 0, height, width]
            times = torch.tensor([sizes] * len(latents), device=self._device)
            given["added_cond_kwargs"] = twice | {"time_ids": times}
        return latents, given

    def _step(self, batch: tuple[Any, dict[str, Any]]) -> Any:
        import torch
        import torch.nn.functional as F

        latents, given = batch
        noise = torch.randn_like(latents[: self.size]).repeat(2, 1, 1, 1)
        times = torch.randint(0, len(self._alphas), (self.size,), device=self._device).repeat(2)
        alpha = self._alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        target = noise
        if self._velocity:
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

        def errors(network):
            prediction = network(noisy, times, **given).sample.float()
            error = (prediction - target).pow(2).mean(dim=(1, 2, 3))
            return error[: self.size] - error[self.size :]

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
