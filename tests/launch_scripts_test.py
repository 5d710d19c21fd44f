"""The scripts in launch/ that start runs elsewhere, with stand-ins for every tool that they call.

A stand-in writes down its words and plays its part: gcloud's ssh runs the command in a folder that
is the worker's home, sbatch runs the script as SLURM would, and Python ends with a given status.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])

TOOL = (
    f"#!{sys.executable} -SE\n"
    + '''
import json, os, sys  # the others take longer than all else that most calls do

place, words = os.environ["FAKE"], [os.path.basename(sys.argv[0]), *sys.argv[1:]]
names = "AGFSYNC_DISTRIBUTED", "JAX_LOCAL_DEVICE_IDS", "WANDB_API_KEY"
entry = {"words": words, "cwd": os.getcwd(), "env": {k: os.environ.get(k) for k in names}}
with open(f"{place}/log", "a") as log:
    log.write(json.dumps(entry) + "\\n")


def next_of(name):
    """The first line of a file, which is taken away; the last one stays."""
    with open(f"{place}/{name}") as file:
        first, *rest = file.read().split()
    if rest:
        with open(f"{place}/{name}", "w") as file:
            file.write("\\n".join(rest))
    return first


def gcloud(verb, name, *flags):
    if verb == "describe":
        state = next_of("states")
        if state == "ABSENT":
            sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: " + name)
        if state == "DENIED":
            sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.describe) PERMISSION_DENIED")
        print(state)
    elif verb == "create":
        sys.exit(int(next_of("creations")))
    elif verb == "scp":
        import shutil

        shutil.copytree(flags[0], f"{place}/vm/agfsync_launch", dirs_exist_ok=True)
    elif verb == "ssh":
        import subprocess

        command = next(f.removeprefix("--command=") for f in flags if f.startswith("--command="))
        env = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "HF_TOKEN")}
        vm = f"{place}/vm"
        if command.endswith(" cause") and os.path.exists(f"{place}/cause"):
            sys.exit(int(next_of("cause")))
        sys.exit(subprocess.run(["bash", "-c", command], cwd=vm, env=env | {"HOME": vm}).returncode)


def agfsync():
    print("agfsync at work", flush=True)
    status = next_of("statuses")
    if status == "wait":
        import signal

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        open(f"{place}/waiting", "w").close()
        signal.pause()
    sys.exit(int(status))


match words:
    case ["gcloud", "compute", "tpus", "tpu-vm", *rest]:
        gcloud(*rest)
    case ["sbatch", *rest]:
        at = next(i for i, word in enumerate(rest) if not word.startswith("--"))
        import shutil, subprocess

        shutil.copy(rest[at], f"{place}/slurm_script")
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_GPUS_ON_NODE": "4"}
        command = ["bash", f"{place}/slurm_script", *rest[at + 1 :]]
        sys.exit(subprocess.run(command, env=os.environ | job).returncode)
    case ["srun", *rest]:
        if os.path.exists(f"{place}/cancel"):
            os.kill(os.getppid(), 15)
        at = next(i for i, word in enumerate(rest) if not word.startswith("--"))
        os.execvp(rest[at], rest[at:])
    case ["nvidia-smi", *_]:
        sys.exit(os.environ.get("NO_GPU"))
    case ["agfsync", *_] | ["python", "-m", "agfsync_jax", *_]:
        agfsync()
    case ["python3" | "python", "-m", "venv", _, folder]:
        import shutil

        os.makedirs(f"{folder}/bin")
        shutil.copy(sys.argv[0], f"{folder}/bin/python")
'''
)
TOOLS = "gcloud xpk docker sbatch srun scontrol nvidia-smi sudo sleep python3 agfsync".split()

# What a shell, ssh, YAML or Kubernetes might take for something else.
NASTY = [
    '--config.prompts.text=it\'s "quoted" `date` $HOME ${HOME} $(date) $$ $$(HOME); rm -rf / & #',
    "--config.a=two\nlines\t and $$ $(HOME) \\n it's",
    "--config.b=(('a.safetensors', 1.0), (\"b\", 2))",
    "--config.c=\\ \\\\ !x *.py ~ {a,b} [0-9] <in >out |",
    "--config.d=  ends with spaces  ",
    "--config.e=é 雪 \x01 \x7f",
    "",
    "--config.f=",
]
FLAGS = ["--config=configs/sd15.py:lcm", "--workdir=gs://bucket/it is", *NASTY]
POD = ["--name=pod", "--zone=us-east5-b", "--type=v6e-16"]
TPU = ["gcloud", "compute", "tpus", "tpu-vm"]
ZONE = "--zone=us-east5-b"
SECRET = "s3cret $key"


class Bench:
    """A checkout, the stand-ins, and what they were asked."""

    def __init__(self, folder):
        self.fake, self.clone = folder, folder / "a clone"
        for name in ("bin", "vm"):
            (folder / name).mkdir()
        for name in TOOLS:
            (folder / "bin" / name).write_text(TOOL)
            (folder / "bin" / name).chmod(0o755)
        (self.clone / "agfsync_jax").mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        for name in ("setup.py", ".gitignore", "agfsync_jax/__init__.py"):
            shutil.copy(ROOT / name, self.clone / name)
        (self.clone / "configs").mkdir()
        (self.clone / "configs" / "sd15.py").write_text("# é")
        subprocess.run(["git", "init", "--quiet", self.clone], check=True)
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "WANDB_API_KEY": SECRET,
        }
        for name in ("PYTHON", "HF_TOKEN", "SLURM_JOB_ID"):
            self.env.pop(name, None)
        self.play()

    def play(self, states="READY", statuses="0", creations="0"):
        (self.fake / "log").write_text("")
        for name, text in (("states", states), ("statuses", statuses), ("creations", creations)):
            (self.fake / name).write_text(text)

    def start(self, script, *args, **env):
        command = ["bash", "launch/" + script, *args]
        return self.run(command, **env)

    def run(self, command, **env):
        return subprocess.run(
            command, env=self.env | env, cwd=self.clone, capture_output=True, text=True, timeout=60
        )

    def entries(self):
        return [json.loads(line) for line in (self.fake / "log").read_text().splitlines()]

    def asked(self, *tools):
        return [e["words"] for e in self.entries() if e["words"][0] in tools]

    def runs(self):
        """Every start of agfsync run."""
        return [e for e in self.entries() if e["words"][1:4] == ["-m", "agfsync_jax", "run"]]

    def verbs(self):
        """What was asked of the TPU, in short."""
        short = [words[4] for words in self.asked("gcloud")]
        return " ".join(v for v in short if v not in ("scp", "ssh"))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def pasted_is_the_same(bench, real, shown, *tools):
    """Whether the lines that --dry-run showed, given to bash, ask for what the real run asked."""
    assert shown.returncode == 0, shown.stderr
    assert not bench.asked(*TOOLS)
    assert SECRET not in shown.stdout and "s3cret" not in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if not line.startswith("#")]
    bench.run(["bash", "-c", "\n".join(lines)])
    pip = ["-m", "pip"]  # whether it is there: .venv is not looked for twice alike
    assert [words for words in bench.asked(*tools) if words[1:3] != pip] == real


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the extra "test"
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["gpu_host.sh", "slurm.sbatch", "tpu_pod.sh", "xpk.sh"])
def test_help(bench, script):
    done = bench.start(script, "--help")
    assert done.returncode == 0 and f"bash launch/{script} --" in done.stdout
    assert "--dry-run" in done.stdout and "SBATCH --" not in done.stdout
    assert not re.search(r"^#|set -euo", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_quoted_words_come_back(bench, locale):
    done = bench.run(
        ["bash", "-c", 'source launch/common.sh; quote "$@"', "-", *NASTY], LC_ALL=locale
    )
    line = done.stdout.removesuffix("\n")
    assert line.isprintable() and "$$" not in line and "$(" not in line
    back = bench.run(["bash", "-c", f"printf '%s\\0' {line}"], LC_ALL=locale)
    assert back.stdout.split("\0")[:-1] == NASTY


# --- a TPU VM or pod


def test_tpu_from_nothing(bench):
    for name in ("new.py", "runs/large", "shared/large"):
        (bench.clone / name).parent.mkdir(exist_ok=True)
        (bench.clone / name).write_text("")
    (bench.clone / "gone.py").write_text("")
    subprocess.run(["git", "-C", bench.clone, "add", "gone.py"], check=True)
    (bench.clone / "gone.py").unlink()
    bench.play(states="ABSENT")
    done = bench.start("tpu_pod.sh", *POD, "--spot", "--project=mine", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "agfsync at work" in done.stdout
    assert "still there and costs money" in done.stderr and "delete --name=pod" in done.stderr

    real = bench.asked("gcloud")
    bundle = f"{bench.clone}/runs/launch/pod/agfsync_launch"
    where = [ZONE, "--project=mine"]
    commands = [
        next(w for w in words if w.startswith("--command=")) for words in real if words[4] == "ssh"
    ]
    assert commands[0].startswith("--command=bash agfsync_launch/tpu_worker.sh start --config=")
    assert real == [
        [*TPU, "describe", "pod", "--format=value(state)", *where],
        [
            *(*TPU, "create", "pod", "--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e"),
            *("--spot", *where),
        ],
        [*TPU, "scp", "--recurse", bundle, "pod:", "--worker=all", *where],
        [*TPU, "ssh", "pod", "--worker=all", commands[0], *where],
        [
            *(*TPU, "ssh", "pod", "--worker=0"),
            *("--command=bash agfsync_launch/tpu_worker.sh follow", *where),
        ],
    ]
    (run,) = bench.runs()
    assert run["words"][4:] == FLAGS
    assert run["cwd"] == f"{bench.fake}/vm/agfsync_jax"
    assert run["env"]["AGFSYNC_DISTRIBUTED"] == "1"
    installs = [w for w in bench.asked("python") if "install" in w]
    assert [w[-1] for w in installs] == [f"--editable={bench.fake}/vm/agfsync_jax[tpu]"]

    # The key came along: for its owner's eyes, and on no command line.
    assert run["env"]["WANDB_API_KEY"] == SECRET
    assert stat.S_IMODE((bench.fake / "vm/agfsync_launch/keys").stat().st_mode) == 0o600
    assert not Path(bundle).exists()
    told = done.stdout + done.stderr + str([e["words"] for e in bench.entries()])
    assert "s3cret" not in told

    # What git ignores, and what is deleted, stayed here.
    there = bench.fake / "vm/agfsync_jax"
    assert (there / "new.py").exists() and (there / "configs/sd15.py").read_text() == "# é"
    assert not any((there / name).exists() for name in ("runs", "shared", "gone.py", ".git"))

    bench.play(states="ABSENT")
    shown = bench.start("tpu_pod.sh", *POD, "--spot", "--project=mine", "--dry-run", *FLAGS)
    pasted_is_the_same(bench, real, shown, "gcloud")
    (run,) = bench.runs()
    assert run["words"][4:] == FLAGS and run["env"]["WANDB_API_KEY"] == SECRET


@pytest.mark.parametrize(
    ("states", "statuses", "verbs", "starts", "ends"),
    [
        ("READY", "0", "describe", 1, 0),
        ("PREEMPTED READY", "0", "describe delete create", 1, 0),
        ("CREATING STARTING READY", "0", "describe describe describe", 1, 0),
        # Preempted twice, once so that nothing is left.
        (
            "READY PREEMPTED PREEMPTED ABSENT ABSENT",
            "143 143 0",
            "describe describe describe delete create describe describe create",
            3,
            0,
        ),
        # Preempted, but what is seen of it is a crash: of the processes that lost one.
        ("READY TERMINATED TERMINATED", "134 0", "describe describe describe delete create", 2, 0),
        # A signal to agfsync alone.
        ("READY", "143 0", "describe describe describe", 2, 0),
        # The processes lost sight of one another.
        ("READY", "75 0", "describe describe describe", 2, 0),
        # Not worth another attempt: an error of the user's, and a crash on a TPU that is there.
        ("READY", "2 0", "describe", 1, 2),
        ("READY", "1 0", "describe describe", 1, 1),
        # No more than --max-restarts.
        (
            "READY",
            "143 143 143 143",
            "describe describe describe describe describe describe",
            3,
            143,
        ),
    ],
)
def test_tpu_states(bench, states, statuses, verbs, starts, ends):
    bench.play(states, statuses)
    done = bench.start("tpu_pod.sh", *POD, "--max-restarts=2", *FLAGS)
    assert done.returncode == ends, done.stderr
    assert bench.verbs() == verbs
    assert [run["words"][4:] for run in bench.runs()] == [FLAGS] * starts


@pytest.mark.parametrize(("cause", "starts", "ends"), [("2", 1, 2), ("137", 1, 137), ("255", 2, 0)])
def test_another_worker_knows_why(bench, cause, starts, ends):
    """Worker 0 stopped because another one did: by an error, killed, or not to be reached."""
    bench.play(statuses="75 0")
    (bench.fake / "cause").write_text(cause)
    done = bench.start("tpu_pod.sh", *POD, *FLAGS)
    assert done.returncode == ends, done.stderr
    assert len(bench.runs()) == starts
    (asked,) = [words for words in bench.asked("gcloud") if words[-2].endswith(" cause")]
    assert asked[5:-2] == ["pod", "--worker=all"]


def test_tpu_that_cannot_be_had(bench):
    bench.play(states="ABSENT", creations="1")
    done = bench.start("tpu_pod.sh", *POD, *FLAGS)
    assert done.returncode == 1 and bench.verbs() == "describe create"
    assert "costs money" not in done.stderr
    # After a preemption it is waited for.
    bench.play("READY ABSENT", "143 0", "1 1 0")
    done = bench.start("tpu_pod.sh", *POD, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "restart 3 of 20" in done.stderr
    assert bench.asked("sleep").count(["sleep", "300"]) == 2
    # An error that is not about its absence makes none.
    bench.play("DENIED")
    done = bench.start("tpu_pod.sh", *POD, *FLAGS)
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert bench.verbs() == "describe"


def test_a_run_outlives_the_watching(bench):
    bench.play(statuses="wait 0")
    watching = subprocess.Popen(
        ["bash", "launch/tpu_pod.sh", *POD, *FLAGS],
        env=bench.env,
        cwd=bench.clone,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 30
    while not (bench.fake / "waiting").exists():
        assert time.monotonic() < until, "agfsync was not started"
        time.sleep(0.02)
    os.killpg(watching.pid, signal.SIGINT)
    _, told = watching.communicate(timeout=30)
    assert watching.returncode == 130 and "the same command shows it" in told

    # Another run is refused; the same one is found again, and ended by stop, for good.
    done = bench.start("tpu_pod.sh", *POD, *FLAGS, "--config.other=1")
    assert done.returncode == 2 and "another run is under way" in done.stderr
    with subprocess.Popen(
        ["bash", "launch/tpu_pod.sh", *POD, *FLAGS],
        env=bench.env,
        cwd=bench.clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout.readline() == "agfsync at work\n"
        done = bench.start("tpu_pod.sh", "stop", "--name=pod", ZONE)
        assert done.returncode == 0, done.stderr
        assert watching.wait(timeout=30) == 130
        assert "goes on" in watching.stderr.read()
    assert len(bench.runs()) == 1
    assert bench.asked("gcloud")[-2][6:8] in (
        ["--worker=all", "--command=bash agfsync_launch/tpu_worker.sh stop"],
        ["--worker=0", "--command=bash agfsync_launch/tpu_worker.sh follow"],
    )
    done = bench.start("tpu_pod.sh", "stop", "--name=pod", ZONE)
    assert done.returncode == 0 and "nothing is running" in done.stderr


def test_tpu_delete(bench):
    done = bench.start("tpu_pod.sh", "delete", "--name=pod", ZONE)
    assert done.returncode == 0, done.stderr
    assert bench.asked("gcloud") == [[*TPU, "delete", "pod", "--quiet", ZONE]]
    done = bench.start("tpu_pod.sh", "delete", "--name=pod", ZONE, "--config=configs/sd15.py")
    assert done.returncode == 1 and "delete takes --name, --zone and --project" in done.stderr


# --- GKE


CLUSTER = ["--name=sdxl", "--cluster=tpus", "--type=v6e-16", "--slices=2", "--image=an/image:1"]


def test_xpk(bench):
    args = [*CLUSTER, "--zone=z", "--project=p", "--max-restarts=3", "--build", *FLAGS]
    done = bench.start("xpk.sh", *args)
    assert done.returncode == 0, done.stderr
    real = bench.asked("docker", "xpk")
    names = bench.clone / "runs/launch/sdxl.env"
    assert real == [
        [
            *("docker", "build", "--platform=linux/amd64"),
            *(f"--file={bench.clone}/launch/Dockerfile", "--build-arg=EXTRA=tpu"),
            *("--tag=an/image:1", str(bench.clone)),
        ],
        ["docker", "push", "an/image:1"],
        [
            *("xpk", "workload", "create", "--workload=sdxl", "--cluster=tpus"),
            *("--tpu-type=v6e-16", "--num-slices=2", "--zone=z", "--project=p"),
            *("--docker-image=an/image:1", f"--env-file={names}", "--max-restarts=3"),
            *("--restart-on-exit-codes=75", "--termination-grace-period-seconds=300"),
            real[2][-1],
        ],
    ]
    # xpk sets a name without a value from its own environment.
    assert names.read_text() == "WANDB_API_KEY\n"
    assert "s3cret" not in done.stdout + done.stderr + str(real)

    # xpk puts the command into a block of YAML, Kubernetes expands $(...) and $$ in it.
    command = real[2][-1].removeprefix("--command=")
    assert command.isprintable()
    # xpk hands SIGTERM to what it started: without exec a shell in between, which would not.
    assert command.startswith(
        "exec env AGFSYNC_DISTRIBUTED=1 AGFSYNC_STOP_SECONDS=240 agfsync run --config="
    )
    seen = re.sub(r"\$\$|\$\(\w+\)", lambda m: "$" if m[0] == "$$" else "expanded", command)
    bench.play()
    bench.run(["bash", "-c", f"({seen}) & wait $!"])
    assert bench.asked("agfsync") == [["agfsync", "run", *FLAGS]]
    assert bench.entries()[-1]["env"]["AGFSYNC_DISTRIBUTED"] == "1"

    bench.play()
    pasted_is_the_same(bench, real, bench.start("xpk.sh", "--dry-run", *args), "docker", "xpk")


def test_xpk_without_keys_and_build(bench):
    bench.env.pop("WANDB_API_KEY")
    done = bench.start("xpk.sh", *CLUSTER, *FLAGS)
    assert done.returncode == 0, done.stderr
    ((*words, _),) = bench.asked("docker", "xpk")
    assert words[7:] == [
        *("--docker-image=an/image:1", "--max-restarts=20", "--restart-on-exit-codes=75"),
        "--termination-grace-period-seconds=300",
    ]


def test_dockerfile():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    # xpk and the script's own flags count on these.
    assert "WORKDIR /app\n" in text and 'ENTRYPOINT ["agfsync"]' in text
    assert set((ROOT / ".dockerignore").read_text().split()) >= {".git", ".venv", "runs"}


# --- SLURM


def test_slurm(bench):
    wanted = ["--name=sdxl", "--nodes=2", "--gpus=4", "--cpus=6", "--time=1:00", "--partition=gpu"]
    done = bench.start("slurm.sbatch", *wanted, *FLAGS)
    assert done.returncode == 0, done.stderr
    python = f"{bench.clone}/.venv/bin/python"
    real = bench.asked("sbatch", "srun", "scontrol")
    assert real == [
        [
            *("sbatch", "--job-name=sdxl", "--nodes=2", "--time=1:00", "--partition=gpu"),
            *("--gpus-per-node=4", "--cpus-per-gpu=6"),
            *("launch/slurm.sbatch", "--max-restarts=20", "--verb=run", *FLAGS),
        ],
        [
            *("srun", "--kill-on-bad-exit=0", "--cpu-bind=none", "env", "AGFSYNC_DISTRIBUTED=1"),
            "AGFSYNC_STOP_SECONDS=240",
            *("JAX_LOCAL_DEVICE_IDS=0,1,2,3", "PYTHONUNBUFFERED=1"),
            *(python, "-m", "agfsync_jax", "run", *FLAGS),
        ],
    ]
    (run,) = bench.runs()
    assert run["words"][4:] == FLAGS and run["cwd"] == str(bench.clone)
    assert run["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"
    installs = [w[-1] for w in bench.asked("python") if "install" in w]
    assert installs == [f"--editable={bench.clone}[cuda]"]

    bench.play()
    shown = bench.start("slurm.sbatch", "--dry-run", *wanted, *FLAGS)
    submitted, job = real
    # The stand-in for sbatch runs the job, and what is pasted runs it once more.
    pasted_is_the_same(bench, [submitted, job, job], shown, "sbatch", "srun")


def test_slurm_runs_a_task_of_a_sweep(bench):
    wanted = ["--verb=sweep", "--array=0-2", "--dependency=afterok:5"]
    done = bench.start("slurm.sbatch", *wanted, *FLAGS, SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    submitted, job = bench.asked("sbatch", "srun")
    assert submitted[1:3] == wanted[1:] and "--verb=sweep" in submitted
    assert job[-len(FLAGS) - 2 :] == ["sweep", *FLAGS, "--index=2"]


def test_slurm_options_are_those_of_the_head():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    head = text.partition("\nset -euo")[0]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.MULTILINE))
    assert text.count("#SBATCH") == len(options)  # SLURM reads none after the first command
    # One process a node, and SIGTERM to the processes (B: would be the shell's) in time to save.
    assert options["ntasks-per-node"] == "1" and options["signal"] == "TERM@300"
    assert {"requeue", "open-mode"} <= options.keys()


@pytest.mark.parametrize(
    ("status", "restarts", "canceled", "queued_again"),
    [("143", "0", False, 1), ("143", "20", False, 0), ("143", "0", True, 0), ("2", "0", False, 0)],
)
def test_slurm_queues_again(bench, status, restarts, canceled, queued_again):
    bench.play(statuses=status)
    if canceled:
        (bench.fake / "cancel").touch()
    done = bench.run(["sbatch", "launch/slurm.sbatch", *FLAGS], SLURM_RESTART_COUNT=restarts)
    assert bench.asked("scontrol") == [["scontrol", "requeue", "7"]] * queued_again
    assert done.returncode == (1 if restarts == "20" else int(status))
    assert ("submit again to go on" in done.stderr) == (restarts == "20")


# --- one host


def test_gpu_host(bench):
    flags = ["--config=configs/sd15.py", "--workdir=runs/a b", *NASTY]
    done = bench.start("gpu_host.sh", *flags)
    assert done.returncode == 0, done.stderr
    (run,) = bench.runs()
    assert run["words"][4:] == flags and run["env"]["AGFSYNC_DISTRIBUTED"] is None
    installs = [w for w in bench.asked("python") if "install" in w]
    assert [w[-1] for w in installs] == [f"--editable={bench.clone}[cuda]"]
    real = bench.asked("python")[-1]
    bench.play()
    shown = bench.start("gpu_host.sh", "--dry-run", *flags)
    pasted_is_the_same(bench, [real], shown, "python")
    done = bench.start("gpu_host.sh", *flags, NO_GPU="no devices were found")
    assert done.returncode == 1 and "nvidia-smi sees no GPU" in done.stderr


# --- errors, before anything is made


@pytest.mark.parametrize(
    ("script", "args", "told"),
    [
        ("tpu_pod.sh", [], "--name and --zone are needed"),
        ("tpu_pod.sh", ["--name=../x", ZONE, *FLAGS], "expected small letters"),
        ("tpu_pod.sh", [*POD[:2], *FLAGS], "--type is missing"),
        ("tpu_pod.sh", [*POD[:2], "--type=v9-8", *FLAGS], "--runtime=VERSION"),
        ("tpu_pod.sh", ["--name", "pod", ZONE, *FLAGS], "in the same word: --name=VALUE"),
        ("tpu_pod.sh", [*POD, "--config", "configs/sd15.py"], "in the same word: --config=VALUE"),
        ("tpu_pod.sh", [*POD, "--config=configs/sd15.py"], "--workdir=DIR is missing"),
        ("tpu_pod.sh", [*POD, "--workdir=gs://b/x"], "--config=FILE is missing"),
        ("tpu_pod.sh", [*POD, FLAGS[0], "--workdir=runs/x"], "--workdir=gs://BUCKET/FOLDER"),
        ("tpu_pod.sh", [*POD, "--config=/etc/passwd", "--workdir=gs://b/x"], "no file of the"),
        ("tpu_pod.sh", [*POD, "--config=../x.py", "--workdir=gs://b/x"], "no file of the"),
        ("tpu_pod.sh", [*POD, "--config=configs/x.py", "--workdir=gs://b/x"], "no file of the"),
        ("xpk.sh", FLAGS, "--name, --cluster, --type and --image are needed"),
        ("xpk.sh", [*CLUSTER, FLAGS[0], "--workdir=runs/x"], "--workdir=gs://BUCKET/FOLDER"),
        ("slurm.sbatch", ["--workdir=runs/x"], "--config=FILE is missing"),
        ("gpu_host.sh", FLAGS[:1], "--workdir=DIR is missing"),
    ],
)
def test_errors(bench, script, args, told):
    done = bench.start(script, *args)
    assert done.returncode == 1 and told in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not bench.entries()


@pytest.mark.parametrize(
    ("script", "args", "tool", "told"),
    [
        ("tpu_pod.sh", [*POD, *FLAGS], "gcloud", "Install the Google Cloud CLI"),
        ("xpk.sh", [*CLUSTER, *FLAGS], "xpk", "pipx install xpk"),
        ("xpk.sh", ["--build", *CLUSTER, *FLAGS], "docker", "leave out --build"),
        ("slurm.sbatch", FLAGS, "sbatch", "on a login node"),
        ("gpu_host.sh", FLAGS, "nvidia-smi", "NVIDIA's driver"),
    ],
)
def test_missing_tools(bench, script, args, tool, told):
    (bench.fake / "bin" / tool).unlink()
    for name in ("bash", "dirname"):
        (bench.fake / "bin" / name).symlink_to(shutil.which(name))
    done = bench.start(script, *args, PATH=str(bench.fake / "bin"))
    assert done.returncode == 1 and not bench.entries()
    assert f"there is no {tool} here" in done.stderr and told in done.stderr


def test_no_checkout(bench):
    shutil.rmtree(bench.clone / ".git")
    done = bench.start("tpu_pod.sh", *POD, *FLAGS)
    assert done.returncode == 1 and "no git checkout" in done.stderr


def test_worker_installs_python(bench):
    """Ubuntu's own Python 3.11 where there is none, and what makes environments where it is not."""
    worker = bench.fake / "vm" / "agfsync_launch"
    subprocess.run(["bash", "launch/pack.sh", worker], cwd=bench.clone, env=bench.env, check=True)
    python = bench.fake / "bin" / "python3"
    for has, wanted in (("false", "python3.11-venv"), ("[[ $2 != *ensurepip* ]]", "python-venv")):
        bench.play()
        python.write_text(f"#!/usr/bin/env bash\n{has}\n")
        done = bench.run(
            ["bash", worker / "tpu_worker.sh", "start", *FLAGS],
            HOME=str(bench.fake / "vm"),
            PYTHON="python3",
        )
        assert done.returncode != 0  # for the stand-in installs nothing
        apt = ["sudo", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600"]
        assert bench.asked("sudo") == [[*apt, "update"], [*apt, "install", "-y", wanted]]
