"""The page does what passn.py does, in short. It runs once, for a few epochs."""

import runpy
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

PAGE = Path(__file__).with_name("one_page.py")
sys.path.insert(0, str(PAGE.parent.parent))
import passn


def test_the_page_does_what_passn_does(monkeypatch, capsys):
    assert "passn" not in PAGE.read_text()
    monkeypatch.setattr(sys, "argv", [str(PAGE), "--epochs", "5"])
    page = runpy.run_path(str(PAGE))
    test, log_p_of_next = page["test"], torch.no_grad()(page["log_p_of_next"])
    rows = torch.cat([page["train"], test]).tolist()
    texts = ["".join("0123456789*="[token] for token in row) for row in rows]
    assert all(eval(text[:5]) == int(text[6:]) for text in texts)
    assert len({tuple(sorted(text[:5].split("*"))) for text in texts}) == 3000  # none twice, not even swapped
    assert_close(log_p_of_next(test[:, :4]), log_p_of_next(test)[:, :4])  # no place looks ahead
    p, confidence, own = 1.0, 1.0, test[:, :6]
    for i in range(6, 10):
        p = p * log_p_of_next(test)[range(1000), i - 1, test[:, i]].exp()
        chance, digit = log_p_of_next(own)[:, -1].exp().max(dim=1)
        confidence, own = confidence * chance, torch.cat([own, digit[:, None]], dim=1)
    values = p.mean(), passn.pass_at_n(p, 64).mean(), confidence.mean()
    assert capsys.readouterr().out == "epoch 5 pass@1 %.3f pass@64 %.3f confidence %.3f\n" % values
    assert values[1] > 0.1 and page["loss_of"] is page["limited"]
    log_p = torch.tensor([-60.0, -10.0, -3.0, -0.1, 0.0], requires_grad=True)
    assert_close(page["pass_at_n"](log_p.exp().double(), 64), passn.pass_at_n(log_p.exp(), 64))
    for loss, N in ("cross_entropy", 1), ("limited", 8), ("limited", 64):
        ours, right = page[loss](log_p, N).float(), passn.dco_loss(log_p, N).mean()
        assert_close(ours, right)
        assert_close(*(torch.autograd.grad(one, log_p)[0] for one in (ours, right)))
