#!/usr/bin/env bash
# Software: peft 0.18.0 and 0.21.2 (torch 2.13.0, transformers 5.24.0) on CPU
#
# Behaviour: with LN_TUNING (LNTuningConfig), `merge_adapter()` exchanges the trained norm and the
# norm of the backbone. The model still computes what was tuned, but `save_pretrained` then writes
# the backbone's norms as the adapter, without a warning: the file, loaded again, is the untuned model.
# With LoRA, `save_pretrained` after `merge_adapter()` writes the trained arrays.
#
# Expected: the adapter that is saved is the one that was trained, merged or not.
#
# Seen, the same with both releases:
#   LNTuningConfig: saved as trained True, saved after merging False, that file is the base True
#   LoraConfig: saved as trained True, saved after merging True, that file is the base False
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

cat >"$dir/merge.py" <<'PY'
import sys
import warnings

import peft
import torch

warnings.simplefilter("ignore")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(6)
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.norm(x))


def base():
    torch.manual_seed(0)
    return Net().eval()


x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
for config in (
    peft.LNTuningConfig(target_modules=["norm"]),
    peft.LoraConfig(target_modules=["linear"]),
):
    model = peft.get_peft_model(base(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5
    tuned, found = model(x), []
    for merged in (False, True):
        if merged:
            model.merge_adapter()
            assert torch.allclose(model(x), tuned, atol=1e-5)
        folder = f"{sys.argv[1]}/{type(config).__name__}_{merged}"
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(base(), folder).eval()(x)
        found.append(torch.allclose(loaded, tuned, atol=1e-5))
    is_base = torch.allclose(loaded, base()(x), atol=1e-5)
    print(
        f"{type(config).__name__}: saved as trained {found[0]}, saved after merging {found[1]}, "
        f"that file is the base {is_base}"
    )
PY
cat >"$dir/expected" <<'TXT'
LNTuningConfig: saved as trained True, saved after merging False, that file is the base True
LoraConfig: saved as trained True, saved after merging True, that file is the base False
TXT

"${PYTHON:-python3}" -m venv "$dir/venv"
for release in 0.18.0 0.21.2; do
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check "peft==$release" torch==2.13.0 \
        transformers==5.24.0
    "$dir/venv/bin/python" "$dir/merge.py" "$dir/$release" >"$dir/seen"
    echo "peft $release"
    cat "$dir/seen"
    diff "$dir/expected" "$dir/seen"
done
