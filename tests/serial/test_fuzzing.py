"""The script that damages inputs finds nothing wrong, and would find it."""

from __future__ import annotations

import json
from pathlib import Path

from mpi_runner import run_mpi

TESTS = Path(__file__).parents[1]
FUZZ = TESTS / "fuzz"

# What a command must not do, as the body of its main function, in a room whose one file is `kept`
# and where it makes `made`, and the words by which that is found.
FAULTS = {
    "a traceback": ("1 // 0", "ZeroDivisionError"),
    "a crash": ("os.abort()", "status -6"),
    "a hang": ("time.sleep(99)", "Timeout (0:00:04)!"),
    "another status": ("return 1", "status 1"),
    "a refusal without a sentence": ("return 2", "0 errors"),
    "a sentence without a refusal": ("say('mpishard: error: no')", "1 errors"),
    "two sentences": ("say('mpishard: error: no\\nmpishard: error: no'); return 2", "2 errors"),
    "a sentence of two lines": ("say('mpishard: error: no\\nno'); return 2", "unusual words: no"),
    "a long sentence": ("say('mpishard: error: ' + 'x' * 9999); return 2", "a sentence of 9999"),
    "a word too many": ("say('by the way')", "unusual words: by the way"),
    "a changed file": ("(room / 'kept').write_text('')", "kept was changed or removed"),
    "a removed file": ("(room / 'kept').unlink()", "kept was changed or removed"),
    "a file left behind": ("(room / 'made.incomplete').touch()", "made.incomplete was left"),
    "an output in spite of a refusal": (
        "(room / 'made').touch(); say('mpishard: error: no'); return 2",
        "made was left",
    ),
    "nothing": ("(room / 'made').touch(); return 0", "nothing"),
}

SCRIPT = f"""
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from fuzz import running

say = lambda words: sys.stderr.write(words + "\\n")
found = {{}}
for name, (body, _) in json.loads(sys.argv[1]).items():
    room = Path(name)
    room.mkdir()
    (room / "kept").write_text("as it was")
    exec("def main():\\n " + body + "\\n return 0")
    running.cli.main = main
    try:
        running.Room(room, 1, 4).run(makes=("made",))
        found[name] = "nothing"
    except running.Finding as finding:
        found[name] = str(finding)
print(json.dumps(found))
"""


def test_damaged_inputs_end_in_a_sentence_or_in_the_right_answer():
    words = [str(FUZZ / "fuzz_inputs.py"), "--inputs", "60"]
    finished = run_mpi(None, words, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    last = finished.stdout.splitlines()[-1]
    assert last.startswith("60 inputs, 5 of them on two ranks, in ")
    assert last.endswith(" refused, 0 wrong")


def test_faults_would_be_found(tmp_path):
    finished = run_mpi(None, ["-c", SCRIPT, json.dumps(FAULTS)], cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert {name: words in found[name] for name, (_, words) in FAULTS.items()} == dict.fromkeys(
        FAULTS, True
    ), found


WRONG = f"""
import sys
import numpy as np
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from fuzz import fuzz_inputs
from fuzz.judge import check_answer, compare_logits

right = {{"a": np.ones((2, 3)), "b": np.array([[np.nan, np.inf]])}}
assert compare_logits(dict(right), right) == ""
for other in (
    {{"a": right["a"]}},
    right | {{"a": right["a"] + 1e-3}},
    right | {{"a": right["a"][:1]}},
    right | {{"b": np.array([[np.nan, 1.0]])}},
):
    assert compare_logits(other, right)
said = {{"output_ids": [1, 2], "finish_reason": "stop", "prompt_tokens": 3}}
check_answer(said, ([1, 2], "stop"), 3)
for answer, tokens in ((([1, 2], "length"), 3), (([1, 3], "stop"), 3), (([1, 2], "stop"), 4)):
    try:
        check_answer(said, answer, tokens)
    except fuzz_inputs.Finding:
        continue
    raise AssertionError(answer)
verdict = fuzz_inputs.Verdict(17, "shards", 1, "wrong", "so it is")
fuzz_inputs.report(verdict, 5)
sys.exit(fuzz_inputs.conclude([verdict], 1.0))
"""


def test_wrong_answers_would_be_found_and_can_be_seen_again():
    finished = run_mpi(None, ["-c", WRONG])
    assert finished.returncode == 1 and not finished.stderr, finished.stderr
    assert "--- again: python tests/fuzz/fuzz_inputs.py --seed 5 --only 17\n" in finished.stdout
    assert finished.stdout.endswith("in 1 s: 0 answered, 0 refused, 1 wrong\n")
