"""The batch scripts of ``scripts/slurm``: what they hand to srun, what they refuse, and how they do
under a real Slurm, the cluster of ``tests/lab/slurm.py``.

The latter are skipped where Slurm is not installed, or mpirun is not MPICH's: its MPI is the one
that srun can start without a library more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands.shell import answered, completions
from mpi_runner.launch import CHECKOUT, environment, mpirun, sweep_shared_memory
from tiny_text import write_spacious

LAB = CHECKOUT / "tests" / "lab" / "slurm.py"
SCRIPTS = CHECKOUT / "scripts" / "slurm"
MODEL, MIXTURE = (CHECKOUT / "data" / name for name in ("cpython-4m", "cpython-moe-7m"))
pytestmark = pytest.mark.waits(60)
NAMES = ["tensor", "data", "expert", "long-context", "chain"]


# What the scripts do with an allocation, which is made up here

ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "trial",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_SUBMIT_DIR": str(CHECKOUT),
}
ONE_NODE = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node1"}
# Says what it was asked, and ends with the status that it was told.
SRUN = """#!/bin/bash
echo "$OPENBLAS_NUM_THREADS $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK" \\
    "$SLURM_MPI_TYPE $MPIR_CVAR_CH4_NETMOD"
printf '%s\\n' "$@"
[[ -t 0 ]] || cat
[[ -z ${GROWS:-} ]] || printf '%s\n' ${ADDED:-header answer} >>"$GROWS"
exit ${ENDS:-0}
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The variables of all scripts, and programs in the place of Slurm's on the PATH."""
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL), ("mpishard", "#!/bin/true\n")):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    given = tmp_path / "given.txt"
    given.write_text("some text")
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MODEL": str(MODEL),
        "PROMPT": "def f",
        "INPUT": str(given),
        "OUTPUT": str(tmp_path / "out"),
    }


def hand_over(name: str, settings: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """What the script `name` does as a job."""
    command = ["bash", str(SCRIPTS / f"{name}.sbatch"), *words]
    return subprocess.run(
        command, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def asked_of_srun(name: str, settings: dict[str, str], *words: str) -> list[str]:
    """The lines of the srun above: threads, words, and what it read."""
    run = hand_over(name, settings, *words)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


COMMANDS = {
    "tensor": ["generate", "{MODEL}", "--tp", "4", "--prompt", "def f", "--seed", "1"],
    "data": ["logits", "{MODEL}", "--dp", "2", "--tp", "4"]
    + ["--input", "{INPUT}", "--output", "{OUTPUT}", "--seed", "1"],
    "expert": ["generate", "{MODEL}", "--dp", "2", "--tp", "4", "--ep", "8"]
    + ["--prompt", "def f", "--seed", "1"],
    "long-context": [
        "generate",
        "{MODEL}",
        "--cp",
        "8",
        "--tp",
        "1",
        "--chunked-prefill-size",
        "4096",
    ]
    + ["--prompt-file", "{INPUT}", "--seed", "1"],
    "chain": ["batch", "{MODEL}", "--dp", "2", "--tp", "4"]
    + ["--input", "{INPUT}", "--output", "{OUTPUT}", "--seed", "1"],
}


def test_every_script_is_tested_and_documented():
    assert {script.stem for script in SCRIPTS.glob("*.sbatch")} == set(NAMES)
    page = (CHECKOUT / "docs" / "cluster.md").read_text()
    assert [name for name in NAMES if f"| `{name}.sbatch` |" not in page] == []


@pytest.mark.parametrize("name", NAMES)
def test_ranks_and_threads_are_those_of_the_allocation(files, name):
    nodes = ONE_NODE if name == "tensor" else {}
    threads, *words = asked_of_srun(name, {**files, **ALLOCATION, **nodes}, "--seed", "1")
    assert threads == "3 3 3 pmi2 ofi"
    assert "--wait=10" in words and "--distribution=block" in words
    start = words.index("mpishard") + 1
    assert words[start:] == [word.format(**files) for word in COMMANDS[name]]


def test_what_is_not_said_is_what_mpich_and_one_thread_want(files):
    settings = {**files, **ALLOCATION, **ONE_NODE, "SLURM_MPI_TYPE": "pmix"}
    del settings["SLURM_CPUS_PER_TASK"]
    assert asked_of_srun("tensor", settings)[0] == "1 1 1 pmix ofi"


def test_the_command_may_be_several_words(files):
    settings = {**files, **ALLOCATION, **ONE_NODE, "MPISHARD": "python -m mpishard"}
    lines = asked_of_srun("tensor", settings)
    assert lines[lines.index("python") :][:4] == ["python", "-m", "mpishard", "generate"]


def test_replicas_may_be_smaller_than_a_node(files):
    settings = {**files, **ALLOCATION, "TP": "2", "EP": "4"}
    lines = " ".join(asked_of_srun("expert", settings))
    assert "--dp 4 --tp 2 --ep 4" in lines
    assert "--cp 4 --tp 2" in " ".join(asked_of_srun("long-context", settings))


WRONG = {
    "no model": ("tensor", {"MODEL": ""}, "MODEL is not set: give the directory of a model"),
    "lost model": ("data", {"MODEL": "/no/model"}, "MODEL=/no/model does not exist on "),
    "no prompt": ("expert", {"PROMPT": ""}, "PROMPT is not set: give the text to complete"),
    "no input": ("long-context", {"INPUT": ""}, "INPUT is not set: give a file with the text"),
    "lost input": ("chain", {"INPUT": "/no/in"}, "INPUT=/no/in does not exist on "),
    "no output": ("chain", {"OUTPUT": ""}, "OUTPUT is not set: give the file to write"),
    "nodes": ("tensor", {}, "2 nodes: tensor parallelism waits for the network"),
    "tp": ("data", {"TP": "3"}, "8 tasks cannot be divided by TP=3: give a divisor"),
    "text for tp": ("chain", {"TP": "two"}, "TP=two is not a number of ranks: 1 or more"),
    "tasks": ("data", {"SLURM_NTASKS": "7"}, "7 tasks are not as many on each of 2 nodes"),
    "no tasks": ("data", {"SLURM_NTASKS": ""}, "Slurm does not say how many ranks to start"),
    "command": ("data", {"MPISHARD": "/no/mpishard"}, "/no/mpishard is not on the PATH of "),
    "no job": ("data", {"SLURM_JOB_ID": ""}, "this is a batch script: hand it to sbatch"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_a_rank_starts(files, case):
    name, change, sentence = WRONG[case]
    run = hand_over(name, {**files, **ALLOCATION, **change})
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.splitlines()[0].startswith(f"trial: error: {sentence}")


def test_the_shared_part_must_be_found(files):
    run = hand_over("data", {**files, **ALLOCATION, "SLURM_SUBMIT_DIR": "/elsewhere"})
    assert run.returncode == 2
    sentence = "/elsewhere/scripts/slurm has no ranks.sh: submit from the checkout, or set SCRIPTS"
    assert run.stderr.splitlines()[-1] == sentence
    settings = {**files, **ALLOCATION, "SLURM_SUBMIT_DIR": "/elsewhere", "SCRIPTS": str(SCRIPTS)}
    assert asked_of_srun("data", settings)


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_a_chain_ends_with_its_batch(files, status):
    run = hand_over("chain", {**files, **ALLOCATION, "ENDS": str(status)})
    assert run.returncode == status
    assert "scontrol" not in run.stdout


def test_a_chain_goes_on_while_it_gets_anywhere(files):
    journal = files["OUTPUT"] + ".journal"
    run = hand_over("chain", {**files, **ALLOCATION, "ENDS": "75", "GROWS": journal})
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "scontrol requeue 7"
    stuck = hand_over("chain", {**files, **ALLOCATION, "ENDS": "75"})
    assert stuck.returncode == 2
    assert "scontrol" not in stuck.stdout
    assert "no request was answered in this round" in stuck.stderr


def test_a_journal_that_was_only_begun_leads_a_chain_nowhere(files):
    settings = {"ENDS": "75", "GROWS": files["OUTPUT"] + ".journal", "ADDED": "header"}
    stuck = hand_over("chain", {**files, **ALLOCATION, **settings})
    assert stuck.returncode == 2 and "scontrol" not in stuck.stdout
    assert "no request was answered in this round" in stuck.stderr


def test_what_tells_a_chain_to_stop_is_held_back_until_it_listens(files, tmp_path):
    asked = asked_of_srun("chain", {**files, **ALLOCATION})
    held = ["env", "--block-signal=TERM,USR1", "mpishard", "batch"]
    start = asked.index("mpishard") - 2
    if subprocess.run([*held[:2], "true"], capture_output=True).returncode == 0:
        assert asked[start : start + 4] == held
    assert "env" not in asked_of_srun("data", {**files, **ALLOCATION})
    (tmp_path / "env").write_text("#!/bin/false\n")  # as old as not to know the option
    (tmp_path / "env").chmod(0o755)
    assert "env" not in asked_of_srun("chain", {**files, **ALLOCATION})


# A real Slurm


class Cluster:
    """Four nodes of two cores, and jobs on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings = {
            # The nodes' cores are the same few, so that waiting ranks must sleep.
            **environment(4, dict.fromkeys(name for name in os.environ if "SLURM" in name)),
            "SLURM_CONF": str(directory / "cluster" / "slurm.conf"),
            "MPISHARD": f"{sys.executable} -m mpishard",
        }

    def says(self, *command: object, **variables: object) -> str:
        """The standard output of one of Slurm's commands, which must succeed."""
        run = subprocess.run(
            [str(word) for word in command],
            env={**self.settings, **{name: str(value) for name, value in variables.items()}},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    def submit(self, name: str, options: str, *words: object, **variables: object) -> int:
        """The number of a new job of the script `name`, with these options of sbatch."""
        streams = [f"--{kind}={self.directory}/%j.{kind}" for kind in ("output", "error")]
        script = SCRIPTS / f"{name}.sbatch"
        command = ["sbatch", "--parsable", *streams, *options.split(), script, *words]
        return int(self.says(*command, **variables))

    def facts(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job."""
        told = self.says("scontrol", "--oneliner", "show", "job", job).split()
        return dict(fact.split("=", 1) for fact in told if "=" in fact)

    def hurry(self, job: int) -> None:
        """Have a job that was put back run again, without the minutes that Slurm would wait."""
        nodes = ["sinfo", "--noheader", "--Node", "--format=%t"]
        wait_until(lambda: set(self.says(*nodes).split()) == {"idle"}, "nodes that are idle")
        # A node that is handed a job in the second in which it ended the last run of that job has
        # revoked its credential ("already killed, do not launch").
        time.sleep(2)
        begin = ["scontrol", "update", f"JobId={job}", "StartTime=now"]

        def begun() -> bool:
            # Time and again: Slurm sets its time a while after the job has become pending.
            subprocess.run(begin, env=self.settings, capture_output=True)  # it may begin meanwhile
            return self.facts(job)["JobState"] != "PENDING"

        wait_until(begun, f"job {job} to begin again")

    def wait(self, job: int, *states: str) -> dict[str, str]:
        """What Slurm knows of a job, once it is in one of these states."""

        def there() -> dict[str, str]:
            facts = self.facts(job)
            return facts if facts["JobState"] in states else {}

        return wait_until(there, f"job {job} in state {' or '.join(states)}")

    def ended(self, job: int) -> tuple[str, str]:
        """The state in which a job ends, and its exit status."""
        facts = self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        return facts["JobState"], facts["ExitCode"]

    def output(self, job: int) -> tuple[str, str]:
        """What a job has written to standard output and standard error."""
        files = [self.directory / f"{job}.{kind}" for kind in ("output", "error")]
        out, err = (file.read_text() if file.exists() else "" for file in files)
        return out, err

    def completed(self, job: int) -> tuple[str, str]:
        """What a job has written that ends well."""
        state = self.ended(job)
        assert state == ("COMPLETED", "0:0"), (state, self.output(job))
        return self.output(job)

    def processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Process id and environment of everything that runs on the nodes."""
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                told = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
                settings = dict(setting.partition("=")[::2] for setting in told)
                if settings.get("SLURM_CONF") == self.settings["SLURM_CONF"]:
                    yield int(directory.name), settings

    def ranks(self, job: int) -> list[int]:
        """The process ids of the ranks of a job, in their order, as far as they run."""
        found = [
            (int(settings["PMI_RANK"]), pid)
            for pid, settings in self.processes()
            if settings.get("SLURM_JOB_ID") == str(job) and "PMI_RANK" in settings
        ]
        return [pid for _, pid in sorted(found)]


def wait_until(there: Callable[[], Any], what: str) -> Any:
    """What `there` finds, once that is anything."""
    deadline = time.monotonic() + 90
    while not (found := there()):
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.1)
    return found


# Does nothing, but says when the cluster is there.
IDLE = ["sh", "-c", "echo up; exec cat"]


def start_lab(*words: object) -> subprocess.Popen[str]:
    """``slurm.py WORDS``, whose command has a pipe for its input: it ends with our end of it,
    whatever ends us, and the cluster with it."""
    command = [sys.executable, str(LAB), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    version = subprocess.run([*mpirun(), "--version"], capture_output=True, text=True).stdout
    if "HYDRA" not in version:
        pytest.skip("mpirun is not MPICH's, whose ranks `srun --mpi=pmi2` can start")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with start_lab("--directory", cluster.directory / "cluster", 4, *IDLE) as lab:
        assert lab.stdout and lab.stderr
        if lab.stdout.readline() != "up\n":
            told = lab.stderr.read().strip()
            if lab.wait() == 2:
                pytest.skip(told)
            pytest.fail(told)
        yield cluster
        lab.communicate(timeout=60)
        assert lab.returncode == 0
    assert list(cluster.processes()) == [], "the cluster has left something behind"
    sweep_shared_memory()  # of ranks that were killed


def test_a_cluster_ends_when_it_is_told_to(cluster, tmp_path):
    other = Cluster(tmp_path)
    with start_lab("--directory", tmp_path / "cluster", 1, *IDLE) as lab:
        assert lab.stdout and lab.stdout.readline() == "up\n"
        assert list(other.processes())
        lab.terminate()
        assert lab.wait(60) == 128 + signal.SIGTERM
    assert list(other.processes()) == []


def test_what_the_lab_cannot_do_is_refused(cluster):
    for words, sentence in {
        (0, "true"): "0 nodes: there can be 1 to 32",
        ("--cpus", 0, 1, "true"): "--cpus 0: a node has at least 1",
        (1,): "there is no command to run",
    }.items():
        with start_lab(*words) as lab:
            assert sentence in lab.communicate()[1]
            assert lab.returncode == 2
    with start_lab(1, "no-such-command") as lab:
        assert (
            lab.communicate()[1] == "slurm.py: error: no-such-command: No such file or directory\n"
        )
        assert lab.returncode == 127


def errors_of(err: str) -> list[str]:
    """The sentences with which mpishard has refused."""
    mark = "mpishard: error: "
    return [line.partition(mark)[2] for line in err.splitlines() if mark in line]


def answers(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_tensor_parallel_on_a_node(cluster):
    asked = ["--max-tokens", 8, "--json"]
    expected = completions(None, MODEL, "--prompt", "def read(", *asked)
    options = "--ntasks-per-node=2 --cpus-per-task=1"
    job = cluster.submit("tensor", options, *asked, MODEL=MODEL, PROMPT="def read(")
    out, err = cluster.completed(job)
    assert answers(out) == expected
    assert "tensor: 2 ranks on 1 nodes (node1), 1 threads each" in err
    assert "--tp 2 --dp 1, float32, threads per rank: 1" in err


def test_data_parallel_over_nodes(cluster, tmp_path):
    lines = [{"id": str(n), "input_ids": list(range(3, 9 + n))} for n in range(5)]
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = tmp_path / "alone.npz"
    answered(None, "logits", MODEL, "--input", given, "--output", alone)
    options = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=2"
    out = tmp_path / "out.npz"
    job = cluster.submit("data", options, MODEL=MODEL, INPUT=given, OUTPUT=out)
    _, err = cluster.completed(job)
    assert "--tp 1 --dp 2, float32, threads per rank: 2" in err
    with np.load(alone) as expected, np.load(out) as found:
        assert set(found) == set(expected) == {line["id"] for line in lines}
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-3)


def test_expert_parallel_over_nodes(cluster):
    asked = ["--prompt", "class Queue:", "--max-tokens", 6, "--json"]
    expected = completions(None, MIXTURE, "--prompt", "def read(", *asked)
    options = "--nodes=2 --ntasks-per-node=2 --cpus-per-task=1"
    job = cluster.submit("expert", options, *asked, MODEL=MIXTURE, PROMPT="def read(")
    out, err = cluster.completed(job)
    assert answers(out) == expected
    assert "--tp 2 --dp 2 --ep 4" in err


def test_a_long_prompt_over_nodes(cluster, tmp_path):
    """Of 300 KB, from a file and through srun's standard input."""
    model, text = write_spacious(tmp_path / "model"), f"w5{300_000 * ' '}w9\nw7 w11 w13"
    given = tmp_path / "long.txt"
    given.write_text(text)
    (right,) = completions(None, model, "--prompt", "w5 w9 w7 w11 w13", "--max-tokens", 6)
    expected = [right | {"prompt": text}]
    options = "--nodes=4 --ntasks-per-node=1 --cpus-per-task=1"
    job = cluster.submit(
        "long-context", options, "--max-tokens", 6, "--json",
        MODEL=model, INPUT=given, CHUNKED_PREFILL_SIZE=2,
    )  # fmt: skip
    out, err = cluster.completed(job)
    assert answers(out) == expected
    assert "--cp 4" in err
    words = ["-m", "mpishard", "generate", model, "--tp", 2, "--max-tokens", 6, "--json"]
    command = ["srun", "--mpi=pmi2", "-n", 2, sys.executable, *words, "--prompt", "-"]
    with given.open() as standard_input:
        run = subprocess.run(
            [str(word) for word in command],
            env={**cluster.settings, "MPIR_CVAR_CH4_NETMOD": "ofi"},
            cwd=CHECKOUT,
            stdin=standard_input,
            capture_output=True,
            text=True,
        )
    assert answers(run.stdout) == expected, run.stderr


def test_a_layout_that_does_not_fit_ends_the_job_with_one_sentence(cluster):
    options = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1"
    job = cluster.submit("expert", options, MODEL=MIXTURE, PROMPT="a", EP=3)
    assert cluster.ended(job) == ("FAILED", "2:0")
    assert len(errors_of(cluster.output(job)[1])) == 1


def test_the_line_to_type_is_of_srun(cluster):
    options = "--ntasks-per-node=2 --cpus-per-task=1"
    job = cluster.submit("tensor", options, "--dp", 2, MODEL=MODEL, PROMPT="a")
    assert cluster.ended(job) == ("FAILED", "2:0")
    typed = f"srun -n 4 python -m mpishard generate {MODEL} --tp 2 --prompt a --dp 2"
    assert errors_of(cluster.output(job)[1]) == [
        f"--tp 2 --dp 2 needs 4 ranks but 2 were started: run `{typed}`"
    ]


def test_ranks_that_do_not_find_each_other_are_refused(cluster):
    options = "--ntasks-per-node=2 --cpus-per-task=1"
    job = cluster.submit("tensor", options, MODEL=MODEL, PROMPT="a", SLURM_MPI_TYPE="none")
    assert cluster.ended(job) == ("FAILED", "2:0")
    (message,) = errors_of(cluster.output(job)[1])
    assert message.startswith("the launcher started 2 ranks, but MPI found 1: srun does not speak")
    assert "`srun --mpi=pmi2` for MPICH" in message


def program(cluster: Cluster, text: str) -> str:
    """A command that runs `text` in the place of mpishard, on ranks."""
    file = cluster.directory / "program.py"
    file.write_text(text)
    return f"{sys.executable} {file}"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core cannot be divided")
def test_every_rank_has_cores_of_its_own(cluster):
    command = program(cluster, "import os; print(*os.sched_getaffinity(0))")
    options = "--ntasks-per-node=2 --cpus-per-task=1"
    job = cluster.submit("tensor", options, MODEL=MODEL, PROMPT="a", MPISHARD=command)
    cores = [line.split() for line in cluster.completed(job)[0].splitlines()]
    assert [len(each) for each in cores] == [1, 1]
    assert cores[0] != cores[1]


def test_a_rank_that_is_killed_on_one_node_ends_the_job_on_all(cluster):
    command = program(cluster, "from mpi4py import MPI\nwhile True: MPI.COMM_WORLD.Barrier()")
    options = "--nodes=4 --ntasks-per-node=1 --cpus-per-task=1"
    settings = {"MODEL": MODEL, "PROMPT": "a", "MPISHARD": command}
    job = cluster.submit("expert", options, **settings)
    ranks = wait_until(lambda: found if len(found := cluster.ranks(job)) == 4 else [], "ranks")
    os.kill(ranks[2], signal.SIGKILL)
    assert cluster.ended(job)[0] == "FAILED"
    wait_until(lambda: not cluster.ranks(job), "the other ranks to end")


@pytest.fixture(scope="module")
def requests(cluster: Cluster) -> Path:
    """A file of requests that keep four ranks busy for a while."""
    lines = [{"id": f"r{n}", "prompt": f"def f{n}(", "max_tokens": 40} for n in range(40)]
    file = cluster.directory / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def start_chain(cluster: Cluster, requests: Path, out: Path) -> int:
    """A chain that has answered something, but not all."""
    options = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1"
    words = ["--ignore-eos", "--max-num-seqs", 2]
    job = cluster.submit("chain", options, *words, MODEL=MODEL, INPUT=requests, OUTPUT=out)
    journal = out.with_name(out.name + ".journal")
    # Not its first line, which is there before every rank listens to signals.
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 2, "answers")
    return job


def test_a_chain_goes_on_where_it_was_told_to_stop(cluster, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    job = start_chain(cluster, requests, out)
    cluster.says("scancel", "--signal=TERM", job)  # which Slurm does when the time is nearly up
    facts = cluster.wait(job, "PENDING")
    assert facts["Restarts"] == "1"
    assert not out.exists()
    cluster.hurry(job)
    _, err = cluster.completed(job)
    assert f"chain: job {job} goes on in another round" in err
    assert [line["id"] for line in answers(out.read_text())] == [f"r{n}" for n in range(40)]


# Is told to stop before Python has come to mpishard.
EARLY = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGTERM)
os.execv(sys.executable, [sys.executable, "-m", "mpishard", *sys.argv[1:]])
"""


def test_a_chain_that_is_told_to_stop_as_it_starts_has_lost_nothing(cluster, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    options = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1"
    settings = {"MODEL": MODEL, "INPUT": requests, "OUTPUT": out}
    early = program(cluster, EARLY)
    job = cluster.submit("chain", options, MPISHARD=early, **settings)
    assert cluster.ended(job) == ("FAILED", "2:0")
    err = cluster.output(job)[1]
    assert "told to stop: 0 of 40 lines are answered" in err
    assert "chain: error: no request was answered in this round before it was told to stop" in err
    journal = out.with_name(out.name + ".journal")
    assert journal.read_bytes().count(b"\n") == 1 and not out.exists()


def test_a_chain_that_is_cancelled_does_not_come_back(cluster, requests, tmp_path):
    job = start_chain(cluster, requests, tmp_path / "out.jsonl")
    cluster.says("scancel", job)
    assert cluster.ended(job)[0] == "CANCELLED"
    assert cluster.facts(job)["Restarts"] == "0"
