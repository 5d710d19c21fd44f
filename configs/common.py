"""What every experiment shares: one block a verb, each key with its meaning; and `parse_arg`."""

from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The blocks that every verb reads. An experiment starts from these and changes lines."""
    c = ConfigDict()
    c.seed = 0  # every random draw derives from it, the round, the prompt and the candidate
    c.rounds = 1  # how often the loop repeats, each time from the last policy

    c.backbone = ConfigDict()  # the text-to-image model
    c.backbone.name = "stable_diffusion"  # a file of agfsync_jax/backbones
    c.backbone.path = ""  # a diffusers folder, a file, a repository (org/name), gs://, micro:NAME
    c.backbone.variant = ""  # of its files: fp16 for model.fp16.safetensors
    c.backbone.kind = ""  # of a single file that does not say itself what it is
    c.backbone.lora = ()  # (path, scale) of LoRA files, added to the weights
    c.backbone.dtype = "float32"  # of the computation: float32, bfloat16 or float16
    c.backbone.attention = "auto"  # the kernel, by device and shape; others: parallel/placement.py

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices an axis; -1: all that are left
    c.sharding = ()  # (path regex, axes) rules, the first match wins; unmatched is replicated

    c.prompts = ConfigDict()
    c.prompts.source = "micro"  # a file of agfsync_jax/prompt_sources
    c.prompts.num_prompts = 512  # a round
    c.prompts.split = "train"  # of the source: what training may see

    c.questions = ConfigDict()
    c.questions.source = "micro"  # a file of agfsync_jax/prompt_sources

    c.sample = ConfigDict()
    c.sample.height = 512  # pixels
    c.sample.width = 512  # pixels
    c.sample.num_inference_steps = 20  # of the sampler
    c.sample.guidance_scale = 7.5  # classifier-free guidance; 1: none
    c.sample.num_candidates = 8  # a prompt
    c.sample.guidance_rescale = 0.0  # 0 to 1: keeps strong guidance from overexposure
    c.sample.sampler = ""  # a file of agfsync_jax/samplers; empty: the checkpoint's own
    c.sample.device_batch_size = 16  # images that a device draws at once, at most
    c.sample.conditioning_noise = 0.1  # std of noise on the text embedding, candidates 1, 2, ...
    c.sample.negative_prompt = ""  # what guidance leads away from
    c.sample.prompts_per_shard = 32  # a shard is whole or absent
    c.sample.lora = ()  # (path, scale) of LoRA files that draw candidates, and have no other part
    c.sample.param_dtype = "float32"  # bfloat16: parameters take half the memory while drawing
    c.sample.refiner = ""  # a second checkpoint of the same kind, for the end of the trajectory
    c.sample.refiner_start = 0.8  # the fraction of the trajectory where it takes over

    c.scorers = ConfigDict()  # a block a scorer: its file in agfsync_jax/scorers, and its arguments
    c.score = ConfigDict()
    c.score.device_batch_size = 64  # images that a device scores at once, at most
    c.score.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # of each process's own devices
    c.score.max_bad = 0.01  # the share of images, questions, ... that may be left out

    c.pair = ConfigDict()
    c.pair.weights = ConfigDict()  # a number a score column; those without one have no say
    c.pair.normalize = "zscore"  # none | zscore | rank | minmax, within a prompt's candidates
    c.pair.min_margin = 0.0  # of the weighted score; smaller pairs are dropped, as are ties
    c.pair.strategy = "best_worst"  # | all_above_margin | top_k_bottom_k | ranked
    c.pair.k = 2  # top_k_bottom_k: each of a prompt's k best against each of its k worst
    c.pair.max_pairs = 0  # a prompt, those with the largest margins; 0: no limit
    c.pair.min_questions = 0  # prompts with fewer are dropped
    c.pair.shuffle_labels = False  # a control: which of a pair is chosen is left to chance
    c.pair.embeddings = False  # stored with the pairs, so that train runs no text encoder
    c.pair.flips = False  # latents of the mirrored images are stored too, for config.train.flip
    c.pair.images = True  # stored as PNGs with the pairs; train does not read them
    c.pair.license = "other"  # of the pairs, as the Hugging Face Hub names it
    c.pair.path = ""  # another workdir's round folder or its pairs/; or people's choices
    c.pair.split = "train"  # of that folder; empty: all parquet files in it
    c.pair.columns = ConfigDict()  # Pick-a-Pic's
    c.pair.columns.caption = "caption"
    c.pair.columns.first = "jpg_0"  # an image
    c.pair.columns.second = "jpg_1"
    c.pair.columns.label = "label_0"  # 1: the first image is preferred, 0: the second, 0.5: a tie
    c.pair.buckets = 0  # 64: images keep their shapes, with sides that are multiples of it; 0: one
    c.pair.max_rows = 0  # of that folder; 0: all
    c.pair.max_bad = 0.01  # share of rows without a caption, or whose images cannot be decoded

    c.loss = ConfigDict()
    c.loss.name = "diffusion_dpo"  # a file of agfsync_jax/losses; its settings: config.loss.NAME

    c.train = ConfigDict()
    c.train.batch_size = 32  # pairs on all devices together
    c.train.num_steps = 200  # of batch_size pairs each
    c.train.learning_rate = 1e-5  # its highest value
    c.train.warmup_steps = 20  # in which the learning rate rises to it
    c.train.schedule = "constant"  # or cosine
    c.train.weight_decay = 0.01  # decoupled, as AdamW has it
    c.train.max_grad_norm = 1.0  # longer gradients are scaled down to it; 0: none are
    c.train.empty_prompts = 0.0  # the share of examples that are learned without their prompt
    c.train.flip = False  # half of the images are learned mirrored; wants config.pair.flips
    c.train.timesteps = ""  # all; "0:200", those of a refiner; or a list, "249,499,749,999"
    c.train.optimizer = "adamw"  # or adafactor, lion
    c.train.momentum_dtype = "float32"  # bfloat16: the first moment takes half the memory
    c.train.inversion_steps = 0  # 10: images' own noise, by DDIM inversion (InPO); 0: random noise
    c.train.noise_offset = 0.0  # of a constant beside the noise, for darker and lighter pictures
    c.train.min_snr_gamma = 0.0  # errors count min(SNR, gamma) / SNR; 5 is usual, 0: all alike
    c.train.lora_rank = 0  # 0: all of the denoiser is trained
    c.train.lora_alpha = 0.0  # adapters' product counts alpha / rank; 0: all of it, as alpha = rank
    c.train.lora_targets = "attention"  # or transformers, all of these; or all, convolutions too
    c.train.lora_dropout = 0.0  # the share of activations that adapters do not see in a step
    c.train.lora_text_encoder = False  # that of text encoders, too; wants embeddings="step"
    c.train.device_batch_size = 0  # pairs that a device takes at once; 0: all
    c.train.remat = "none"  # dots or full: blocks are run again for their gradient, for less memory
    c.train.embeddings = "cached"  # step: the text encoder runs in every step
    c.train.ema_decay = 0.0  # of a moving average, which is then what training makes; 0: none
    c.train.save_every = 100  # steps
    c.train.keep = 2  # checkpoints, the newest
    c.train.validate_every = 0  # steps; 0: never. Held-out prompts are drawn and scored
    c.train.num_validation_prompts = 16  # the first of the held-out ones; 0: none are drawn
    c.train.held_out = 0.0  # the share of prompts whose pairs no step learns, validations alone
    c.train.best = ""  # a validation's metric, such as vqa: the best checkpoint by it stays too
    c.train.patience = 0  # validations without a better one, after which training ends; 0: never
    c.train.tensorboard = True  # events in checkpoints/tensorboard
    c.train.wandb = ""  # a project of Weights & Biases, if wanted
    c.train.start = ""  # a checkpoint where round 0's policy starts, instead of at its reference
    c.train.reference = "round"  # where a round starts; first: config.backbone in every round
    c.train.reference_decay = 0.0  # a step: the reference follows the policy; 0: it stays there
    c.train.auto_beta = 0.0  # 0.2: beta is such that the mean pair counts 0.2; 0: the loss's own
    c.train.seed = 0  # of the order of pairs, noise and timesteps

    c.evaluate = ConfigDict()
    c.evaluate.source = "micro"  # a file of agfsync_jax/prompt_sources; empty: that of prompts
    c.evaluate.split = "heldout"  # prompts that training never sees
    c.evaluate.num_prompts = 300  # that base and tuned draw alike; 0: all of the source
    c.evaluate.num_seeds = 2  # images a prompt
    c.evaluate.evaluators = ()  # files of agfsync_jax/evaluators, which judge beside the scorers
    c.evaluate.sample = ConfigDict()  # keys of config.sample with other values where models are
    # judged and exported: sampler, num_inference_steps, guidance_scale and the like

    c.export = ConfigDict()
    c.export.output = ""  # a new folder; round_NNN/export in the workdir where it is empty
    c.export.dtype = "float32"  # of the files; float16 is what most people share
    c.export.lora = ""  # diffusers, kohya or peft: the trained adapters alone, in this layout

    c.bench = ConfigDict()
    c.bench.model = "stable-diffusion-v1-5"  # its sizes, with random weights
    c.bench.file_dtype = "float16"  # load: of the files
    c.bench.repeats = 3  # turns of each side
    c.bench.param_dtype = "float32"  # load: what is held in memory
    c.bench.dtype = ""  # sample: float32 on a CPU, bfloat16 elsewhere
    c.bench.height = 0  # sample: pixels, 0 for what the model was trained on
    c.bench.width = 0  # the same
    c.bench.num_inference_steps = 20  # sample
    c.bench.guidance_scale = 7.5  # sample
    c.bench.batch_size = 8  # images, or pairs for train
    c.bench.sampler = "ddim"  # sample
    c.bench.unet_width = 1.0  # the share of the UNet's channels that are left
    c.bench.num_train_steps = 2  # train: a turn
    c.bench.num_prompts = 4  # score: a turn
    c.bench.num_candidates = 8  # images a prompt
    c.bench.num_questions = 15  # a prompt, asked of each of its images
    c.bench.num_requests = 5_000  # ask: a turn
    c.bench.concurrency = 64  # ask: requests at once
    c.bench.num_texts = 120_000  # duplicates: a turn
    c.bench.text_width = 384  # of a text's embedding

    c.report = ConfigDict()
    c.report.num_examples = 12  # prompts shown in the grids
    return c


def agfsync() -> ConfigDict:
    """The published setting (arXiv:2403.13352) on a released model: what its configs share.

    Eight candidates a prompt in 15 steps with guidance 4.5, BLIP-2 FLAN-T5-XXL for the questions,
    CLIP ViT-L/14 and LAION's aesthetic head on it; all three have equal say in a pair.
    """
    c = get_config()
    # Weights and moments are split over all devices; where a device holds all of them, data=-1 and
    # fsdp=1 pass nothing around.
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    c.score.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    c.sharding = ((r"kernel$", "fsdp"),)
    c.backbone.dtype = "bfloat16"
    c.prompts.source = "jsonl"
    c.prompts.path = ""
    c.prompts.num_prompts = 45_800
    c.prompts.split = "all"  # a file for one purpose is whole
    c.questions.source = "jsonl"
    c.questions.path = ""

    c.sample.num_inference_steps = 15
    c.sample.guidance_scale = 4.5
    c.sample.param_dtype = "bfloat16"

    clip = "openai/clip-vit-large-patch14"
    head = (
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac+logos+ava1-l14-linearMSE.pth"
        "#sha256=21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    )
    c.score.device_batch_size = 16
    c.scorers.vqa = ConfigDict(
        dict(name="vqa", path="Salesforce/blip2-flan-t5-xxl", dtype="bfloat16")
    )
    split = ("fsdp", "tensor")  # either axis will do
    c.scorers.vqa.sharding = (
        (r"\.(q|k|v|qkv|wi_0|wi_1|fc1|lm_head)\.kernel", (None, split)),
        (r"\.(o|wo|fc2|projection)\.kernel", (split,)),
    )
    c.scorers.clip = ConfigDict(dict(name="clip", path=clip, dtype="bfloat16"))
    c.scorers.aesthetic = ConfigDict(dict(name="aesthetic", path=clip, head=head, dtype="bfloat16"))
    c.pair.weights = ConfigDict(dict(vqa=1.0, clip=1.0, aesthetic=1.0))
    c.pair.min_questions = 5

    c.train.batch_size = 64
    c.train.device_batch_size = 2  # on 8 GPUs as published: 2 pairs, 4 times
    c.train.num_steps = 1000
    c.train.learning_rate = 1e-6
    c.train.warmup_steps = 0
    c.train.schedule = "cosine"
    c.train.remat = "full"

    c.evaluate.source = ""  # that of prompts, a file of its own or another split
    c.evaluate.path = ""
    c.evaluate.split = "all"
    c.evaluate.num_prompts = 0
    return c


def latent_consistency(c: ConfigDict, lora: str) -> None:
    """Candidates are drawn with a latent consistency LoRA (arXiv:2311.05556): 5 steps without
    guidance. As in AGFSync's code, the model that is trained and judged is the one without it."""
    own = ("sampler", "num_inference_steps", "guidance_scale")
    c.evaluate.sample = ConfigDict({key: c.sample[key] for key in own})
    c.sample.lora = ((lora, 1.0),)
    c.sample.sampler = "lcm"
    c.sample.num_inference_steps = 5
    c.sample.guidance_scale = 1.0


def beta_of_dpo(c: ConfigDict, beta: float) -> None:
    """The beta of Diffusion-DPO and of the losses that take the same reward; others have theirs."""
    for name in ("diffusion_dpo", "cdpo", "dgpo", "hinge", "ipo", "rankdpo", "smpo"):
        c.loss[name] = ConfigDict(dict(beta=beta))


def diffusion_dpo(c: ConfigDict, *, beta: float, optimizer: str, warmup_steps: int) -> None:
    """Trains as arXiv:2311.12908 does, on people's choices: `config.pair.path` is a Pick-a-Pic.

    Its learning rate is 1e-8 a pair, times 2,048 pairs a step: 2.05e-5. (The paper has 2000 / beta
    times that, the released code that itself.) On 16 A100 its code took a day for Stable Diffusion
    1.5's 2,000 steps, and 30 hours for 200 of SDXL's.
    """
    beta_of_dpo(c, beta)
    c.train.batch_size = 2048
    c.train.num_steps = 2000
    c.train.learning_rate = 2048 * 1e-8
    c.train.optimizer = optimizer
    c.train.schedule = "constant"
    c.train.warmup_steps = warmup_steps
    c.train.empty_prompts = 0.2
    c.pair.flips = c.train.flip = True
    if optimizer == "adafactor":  # its code clips the norm of AdamW's gradients alone
        c.train.max_grad_norm = 0.0


def lora(c: ConfigDict, *, batch_size: int, num_steps: int) -> None:
    """Trains adapters of rank 8, as diffusers' research project diffusion_dpo does.

    Its beta of 2500 stands where others have beta / 2: here that is 5000. One GPU is enough.
    """
    beta_of_dpo(c, 5000.0)
    c.train.lora_rank = 8
    c.train.batch_size = batch_size
    c.train.num_steps = num_steps
    c.train.learning_rate = 1e-5
    c.train.schedule = "constant"


def small(c: ConfigDict) -> None:
    """For one GPU of 24 GB: BLIP-2 FLAN-T5-XL, few images and pairs at once, Adafactor.

    JAX takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is in the
    environment.
    """
    c.scorers.vqa.path = "Salesforce/blip2-flan-t5-xl"
    c.sample.device_batch_size = 2
    c.score.device_batch_size = 4
    c.train.device_batch_size = 1
    if not c.train.lora_rank:  # AdamW's moments take 6.4 GiB, and with them little is left
        c.train.optimizer = "adafactor"


def training_seeds() -> Iterator[dict[str, int]]:
    """A sweep: overrides for three training seeds."""
    for seed in range(3):
        yield {"train.seed": seed}


def parse_arg(
    arg: str | None,
    *,
    apart: Sequence[tuple[str, str]] = (),
    **known: bool | int | float | str,
) -> ConfigDict:
    """Reads the part after the colon of `--config=FILE:arg`, such as "tiny,rounds=3".

    Args:
        arg: comma-separated `key=value`, or `key` alone for a switch.
        apart: switches that cannot be given together.
        **known: the keys that may be given, with their defaults, which fix the types.

    Raises:
        ValueError: a key that is not known, a value of another type, or two that exclude each
            other.
    """
    values = ConfigDict(known)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in known:
            raise ValueError(f"config argument {key!r} is unknown; known: {', '.join(known)}")
        kind = type(known[key])
        if kind is bool:
            if equals and text not in ("true", "false"):
                raise ValueError(f"config argument {key}={text}: expected true or false")
            values[key] = text != "false"
            continue
        try:
            values[key] = kind(text)
        except ValueError:
            message = f"config argument {key}={text}: expected {kind.__name__}"
            raise ValueError(message) from None
    for first, second in apart:
        if values[first] and values[second]:
            raise ValueError(
                f"config argument {first},{second}: they are two ways of training, give one"
            )
    return values
