"""peft's own tests with tCUR: ``make test-peft PEFT=CHECKOUT``, or ``peft_own.py CHECKOUT``.

From a checkout of peft those tests are run, with the peft that is installed, that are for VeRA
too, with tCUR in its place (`peft_own_plugin`); tiny models stand in for those of the hub
(`peft_own_models`). What fails and is not in `NOT_APPLICABLE` makes the exit status 1, and so does
an entry of that list which no failure needs. The counts are written into docs/peft.md.

Needs pytest-xdist, datasets, diffusers and parameterized beside what the tests of peft need.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import documents  # noqa: E402

DOCUMENT = ROOT / "docs" / "peft.md"
FILES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_other",
    "test_seq_classifier",
    "test_torch_compile",
)
#: Regular expression of a test's name and one of its error -> why it is none for tCUR.
NOT_APPLICABLE = {
    (
        "test_load_model_low_cpu_mem_usage",
        "uses shared state stored on the tuner|direct injection",
    ): ("its last line injects without a tuner, which would throw the cores away: refused"),
    ("test_loading_model_", "expected the base that the adapter was made for"): (
        "it loads onto another, newly drawn base; an adapter fits the one that C and R are of"
    ),
    ("test_training_.*layer_indexing", "nb_trainable < nb_trainable_all"): (
        "it counts trained tensors; with fewer layers a core has fewer slices, but is one tensor"
    ),
    ("test_from_pretrained_cache_dir", "Can't find 'adapter_config.json'"): (
        "it downloads into a folder of its own"
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkout", type=Path, help="a checkout of peft")
    parser.add_argument("--files", nargs="*", default=FILES, help="of its tests, without .py")
    parser.add_argument("--processes", default="2")
    chosen = parser.parse_args()
    checkout = chosen.checkout.resolve()
    if not (checkout / "tests" / "testing_common.py").is_file():
        parser.error(f"checkout: expected a checkout of peft, got {checkout}")
    rows, failed, reasons = [], [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.files:
            counts, failures = run(checkout, name, Path(folder), chosen.processes)
            none = 0
            for test, error in failures:
                key = next((key for key in NOT_APPLICABLE if is_of(key, test, error)), None)
                if key is None:
                    failed.append(f"{name}: {test}: {error[-300:]}")
                else:
                    reasons[key] += 1
                    none += 1
            rows.append((name, counts["passed"], counts["skipped"], none, len(failures) - none))
            print(*rows[-1], flush=True)
    print(*failed, sep="\n")
    is_whole = tuple(chosen.files) == FILES
    unused = [key for key in NOT_APPLICABLE if is_whole and key not in reasons]
    for key in unused:
        print(f"no failure is as {key}")
    if is_whole:
        write(rows, reasons)
    return 1 if failed or unused else 0


def is_of(key, test, error):
    """Whether a failure is one that an entry of `NOT_APPLICABLE` is about."""
    return re.search(key[0], test) is not None and re.search(key[1], error) is not None


def run(checkout, name, folder, processes):
    """Counts of a file's tests, and name and error of each that failed."""
    report = folder / f"{name}.xml"
    path = [checkout, ROOT, ROOT / "tests"]
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_own_plugin", "-n", processes]
    command += ["-p", "no:cacheprovider", "--rootdir", checkout, "-c", os.devnull]
    command += [f"--junitxml={report}", "--tb=short", f"tests/{name}.py"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not report.exists():
        return Counter(), [(name, done.stdout[-2000:])]
    counts, failures = Counter(), []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [case.find(kind) for kind in ("failure", "error")]
        bad = [each for each in bad if each is not None]
        if bad:
            failures.append((case.get("name"), bad[0].text or bad[0].get("message")))
        else:
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
    return counts, failures


def write(rows, reasons):
    """The table of docs/peft.md."""
    total = ("all", *(sum(row[column] for row in rows) for column in range(1, 5)))
    lines = [
        "| file | passed | skipped by peft | not applicable | failed |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in [*rows, total]]
    lines += ["", "Not applicable:", ""]
    lines += [f"- `{key[0]}`, {reasons[key]}: {why}" for key, why in NOT_APPLICABLE.items()]
    documents.fill({"peft_own": "\n".join(lines) + "\n"}, [DOCUMENT])


if __name__ == "__main__":
    sys.exit(main())
