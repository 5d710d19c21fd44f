"""The released configs and their variants; tests/released_configs_test.py runs each of them.

tests/contracts_test.py compares this table with the configs themselves.
"""

VARIANTS = {
    "sd14": ("lcm", "dpo", "lora", "small"),
    "sd15": ("lcm", "dpo", "lora", "small"),
    "sd21": ("dpo", "lora", "small"),
    "sdxl": ("lcm", "dpo", "lora", "small"),
}
RELEASED = [
    f"configs/{name}.py{variant}"
    for name, variants in VARIANTS.items()
    for variant in ("", *(f":{each}" for each in variants))
]
# Variants combine.
RELEASED += [f"configs/{name}.py:small,lcm" for name in VARIANTS if "lcm" in VARIANTS[name]]
