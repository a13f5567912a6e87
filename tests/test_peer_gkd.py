"""`gkd` against TRL's full-logits implementation: the same loss and the same gradient on the same responses.

TRL is no dependency. Name a Python that has it: `TRL_PYTHON=/path/to/python pytest -m slow tests/test_peer_gkd.py`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strategies import STRATEGIES
from strategies.functional import full_jsd
from tropd_cli.batching import TokenBatch, token_batch
from tropd_cli.credit_loss import CreditLoss, CreditRequest
from tropd_cli.crediting import token_credit
from tropd_cli.models import LanguageModel
from tropd_cli.scoring import ScoringOptions, score_teacher

from .test_credit_loss import gradients
from .tiny import full_logits, random_rollout, tiny_model, tiny_vocabulary

MIXES = (0.0, 0.1, 0.5, 0.9, 1.0)  # the uneven ones tell whether both mean the same side by it

#: Reads both models' logits [B, T, V] and labels; writes loss and gradient with respect to the student's, per beta.
PEER = """
import sys, torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
data, results = torch.load(sys.argv[1]), {}
for beta in data["betas"]:
    logits = data["student"].clone().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(logits, data["teacher"], labels=data["labels"], beta=beta)
    loss.backward()
    results[beta] = (loss.detach(), logits.grad)
torch.save(results, sys.argv[2])
"""


def peer_results(student: Tensor, teacher: Tensor, folder: Path) -> dict[float, tuple[Tensor, Tensor]]:
    """TRL's (loss, gradient [N, V]) per mix, with one masked position of nonsense at the end."""
    python = os.environ.get("TRL_PYTHON")
    if not python:
        pytest.skip("TRL_PYTHON names no Python that has trl")
    padded = [torch.cat([logits.detach(), torch.full_like(logits[:1], 3.0)])[None] for logits in (student, teacher)]
    labels = torch.ones(1, len(student) + 1, dtype=torch.long)
    labels[0, -1] = -100
    request = {"student": padded[0], "teacher": padded[1], "labels": labels, "betas": MIXES}
    torch.save(request, folder / "request.pt")
    quiet = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [python, "-c", PEER, str(folder / "request.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "results.pt")
    assert all(bool((gradient[0, -1] == 0).all()) for _, gradient in results.values())
    return {mix: (loss, gradient[0, :-1]) for mix, (loss, gradient) in results.items()}


def our_gradients(student: LanguageModel, teacher: LanguageModel, batch: TokenBatch, mix: float) -> dict[str, Tensor]:
    """Of every weight, through the engine's chunks."""
    strategy = STRATEGIES.build({"name": "gkd", "mix": mix})
    scores = score_teacher(teacher, batch, strategy.needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
    request = CreditRequest(strategy.needs, token_credit(strategy, 0.0), num_tokens=len(batch))
    loss, _ = CreditLoss(student, chunk_tokens=6)(batch, scores, request)
    loss.backward()
    return gradients(student.model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gkd_equals_trl(dtype: torch.dtype, tmp_path: Path) -> None:
    student, teacher = tiny_model("qwen", dtype=dtype), tiny_model("llama", seed=5, dtype=dtype)
    batch = token_batch(random_rollout([9, 4, 1, 7]), [0, 1, 2, 3], pad_id=0)
    logits = full_logits(student, batch)
    with torch.no_grad():
        teacher_logits = full_logits(teacher, batch)
    peer = peer_results(logits, teacher_logits, tmp_path)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    logprobs = [values.detach().log_softmax(-1) for values in (logits, teacher_logits)]
    for mix, (loss, logit_gradient) in peer.items():
        ours = full_jsd(logprobs[0], logprobs[1], mix=mix).mean()
        torch.testing.assert_close(ours, loss, rtol=tolerance, atol=tolerance)
        logits.backward(logit_gradient, retain_graph=True)
        theirs = gradients(student.model)
        found = our_gradients(student, teacher, batch, mix)
        scale = max(gradient.abs().max().item() for gradient in theirs.values())
        worst = max((found[name] - theirs[name]).abs().max().item() for name in theirs) / scale
        print(f"mix {mix}: loss {loss.item():.12f}, ours - theirs {(ours - loss).item():.1e}, gradient {worst:.1e}")
        assert found.keys() == theirs.keys() and worst < tolerance
