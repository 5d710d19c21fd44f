import pytest

from agfsync_jax.steps import checks
from agfsync_jax.utils import configs

MICRO = "configs/micro.py"


def test_check_names_what_is_wrong(tmp_path):
    here = dict.fromkeys(
        ("backbone.path", "scorers.vqa.path", "scorers.aesthetic.path", "scorers.aesthetic.head"),
        str(tmp_path),
    )
    nothing = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'dpo' is not in agfsync_jax/losses"):
        checks.check(configs.load(MICRO, {"loss.name": "dpo"}), "prompts")
    missing = configs.load(MICRO, here | {"backbone.path": nothing})
    checks.check(missing, "prompts")  # reads no weights
    with pytest.raises(FileNotFoundError, match="nothing"):
        checks.check(missing, "sample")
    missing = configs.load(MICRO, here | {"scorers.clip.path": nothing})
    checks.check(missing, "sample")
    with pytest.raises(FileNotFoundError, match="nothing"):
        checks.check(missing, "score")


def test_lora_files_are_looked_for(tmp_path):
    missing = str(tmp_path / "lora.safetensors")
    with pytest.raises(FileNotFoundError, match="lora.safetensors"):
        checks.check(configs.load(MICRO, {"backbone.lora": f"(({missing!r}, 1.0),)"}), "sample")
    with pytest.raises(ValueError, match=r"backbone.lora has .* expected \(path, scale\)"):
        checks.check(configs.load(MICRO, {"backbone.lora": f"({missing!r}, 1.0)"}), "sample")
