"""Every concept stands once: what a search for it finds, and where."""

import re
from pathlib import Path

import pytest

import tcur_kernels

PACKAGE = Path(tcur_kernels.__file__).parent

#: Concept -> what only its own module writes, and that module.
HOMES = {
    "an operator's arguments": (r"class CurLinear\(", "operators/contract.py"),
    "registration with torch": (r"torch\.library\.define\(", "operators/contract.py"),
    "registration of derivatives": (r"register_autograd\(", "operators/contract.py"),
    "the choice of a backend": (r"def language_of\(", "operators/dispatch.py"),
    "the entry of a plan": (r"class StackPlan\b", "adapters/plan.py"),
    "the rules of a plan": (r"the only slice of its shape", "adapters/plan.py"),
    "from a plan to places": (r"def places_of\(", "adapters/build.py"),
    "what is stored of a stack": (r"class StackRecord\b", "adapters/record.py"),
    "fingerprints": (r"class Fingerprint\b", "adapters/fingerprint.py"),
    "digests of files": (r"def digest_of\(", "adapters/sealing.py"),
    "the adapter file": (r"tcur_kernels\.adapter\"", "adapters/file.py"),
    "the LoRA directory": (r"\"adapter_config\.json\"", "adapters/lora_file.py"),
    "the mean of adapters": (r"class Mean\b", "adapters/average.py"),
    "indices of shards": (r"\"weight_map\"", "files/shards.py"),
    "the header of safetensors": (r"__metadata__", "files/tensor_file.py"),
    "JSON of others": (r"json\.loads\(", "files/parsing.py"),
    "renamings of transformers": (r"conversion_mapping", "files/origins.py"),
    "files that replace others": (r"os\.(replace|rename)\(", "files/whole.py"),
    "rows of a batch": (r"class Rows\b", "layers/rows.py"),
    "cores of many adapters": (r"class StackedCores\b", "adapters/batch.py"),
    "what ids may be": (r"def check_ids\(", "adapters/ids.py"),
    "slots of a store": (r"class AdapterStore\b", "adapters/store.py"),
    "adapters that are trained together": (r"class Tenants\b", "adapters/tenants.py"),
    "W_eff that is kept": (r"class Kept\b", "layers/w_eff.py"),
    "where a weight is stored": (r"class Place\b", "layers/weights.py"),
}


@pytest.mark.parametrize("concept", HOMES)
def test_a_concept_has_one_home(concept):
    pattern, home = HOMES[concept]
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        if re.search(pattern, path.read_text(encoding="utf-8"))
    ]
    assert found == [home]
