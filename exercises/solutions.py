"""The exercises' solutions, one function each. Run them in the folder of passn.py:

    python exercises/solutions.py 3
    python exercises/solutions.py 6 --math-dir DIR

Runs are read from the folder --out, and new ones are saved there. A run that is there is not trained again.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of passn.py

import passn
from passn import dco_loss, estimate_pass_at_n, limited_policy, optimal_policy, pass_at_n

NS = (1, 8, 64, 512)  # tries


def fail(message):
    print(f"solutions.py: {message}", file=sys.stderr)
    sys.exit(2)


def line(label, *cells):
    """Print a line of a table: texts as they are, numbers with three digits."""
    texts = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    print(f"{label:40}", *(f"{text:>10}" for text in texts))


def saved(args, options, *names):
    """For each name a list of runs: those of the seeds 10 to 12 that the folder has for every name."""
    paths = [[Path(args.out, f"{name}-seed{seed}.json") for name in names] for seed in (10, 11, 12)]
    complete = [row for row in paths if all(path.is_file() for path in row)]
    if not complete:
        command = f"python passn.py {options}--seed 10 --seeds 3 --out {args.out}"
        fail(f"{args.out} does not have the runs of {', '.join(names)}; first run {command}")
    return [[json.loads(path.read_text(encoding="utf-8")) for path in row] for row in zip(*complete)]


def show(args, loss, N=64, **changes):
    """Print a line on the run on multiply with seed 10 and these settings: from the folder, or else trained now."""
    usual = passn.SETTINGS["multiply"]
    changed = "".join(f"-{name}={value}" for name, value in changes.items() if value != usual[name])
    path = Path(args.out, f"multiply-{loss}-N{N}{changed}-seed10.json")
    if not path.is_file():
        passn.train(passn.TASKS["multiply"](10), loss, N, seed=10, out=args.out, **changes)
    run = json.loads(path.read_text(encoding="utf-8"))
    end = run["history"][-1]
    best = max(record["test"]["pass@64"] for record in run["history"])
    values = [*pass_at_end(run, NS), end["test"]["confidence"], end["train"]["pass@1"], best]
    line(run["label"], *values, f"{end['updates']}")


def header():
    line("", *(f"pass@{n}" for n in NS), "confidence", "train p", "best@64", "updates")


def pass_at_end(run, Ns):
    test = run["history"][-1]["test"]
    return [test[f"pass@{n}"] for n in Ns]


def solution_1(args):
    [[run, *_]] = saved(args, "", "multiply-ce-N1")
    names = ("pass@1", "pass@64", "confidence")
    line("", *names)
    for record in run["history"]:
        line(f"epoch {record['epoch']}", *(record["test"][name] for name in names))


def solution_2(args):
    line("", "best@64", "at T", "in epoch", "at the end", "at T")
    for runs in saved(args, "", "multiply-ce-N1", "multiply-limited-N64"):
        for run in runs:
            choices = []
            for record in run["history"]:
                last = [(test["pass@64"], T, f"{record['epoch']}") for T, test in record["tempered"].items()]
                choices += last
            line(f"{run['label']}, seed {run['seed']}", *max(choices), *max(last)[:2])


def solution_3(args):
    [[run, *_]] = saved(args, "", "multiply-limited-N64")
    p = torch.tensor(run["problems"]["p"], dtype=torch.float64)
    line("", "pass@64", "deviation")
    line("exact", pass_at_n(p, 64).mean())
    torch.manual_seed(0)
    for n in (64, 128, 512):
        num_right = torch.distributions.Binomial(n, p).sample([200])  # 200 times n samples of each problem
        unbiased = estimate_pass_at_n(n, num_right, 64).mean(dim=1)
        naive = pass_at_n(num_right / n, 64).mean(dim=1)
        line(f"{n} samples, unbiased", unbiased.mean(), unbiased.std())
        line(f"{n} samples, c/n for p", naive.mean(), naive.std())


def solution_4(args):
    names = [f"multiply-{name}" for name in ("ce-N1", "limited-N8", "limited-N64", "limited-N512")]
    rows = saved(args, "--frontier ", *names)
    pass_at = np.array([[pass_at_end(run, passn.EVAL_NS) for run in runs] for runs in rows]).mean(axis=1)
    behind = pass_at.max(axis=0) - pass_at  # (training Ns, tries)
    line("", "mean", "behind")
    for i, runs in enumerate(rows):
        line(runs[0]["label"], pass_at[i].mean(), behind[i].max())


def solution_5(args):
    log_p = torch.tensor([-20.0, -10, -6, -4, -1], requires_grad=True)
    line("log p", *(f"{value:.0f}" for value in log_p))
    for name, loss in passn.LOSSES.items():
        gradient, = torch.autograd.grad(loss(log_p, 64), log_p)
        line(f"weights by {name}", *-gradient)
    header()
    for name, N in (("ce", 1), ("limited", 64), ("reward", 64)):
        show(args, name, N)


def solution_6(args):
    task = passn.TASKS["math"](0, args.math_dir)
    p = task.answer_frequencies.numpy()
    line("", *(f"pass@{n}" for n in NS))
    policies = {"by frequency": lambda p, N: p, "as the limited loss tends": limited_policy, "optimal": optimal_policy}
    for name, policy in policies.items():
        line(name, *(passn.guess_pass_at_n(task, policy, N) for N in NS))
    line(f"of {len(p)} answers, optimal keeps", *(f"{np.count_nonzero(optimal_policy(p, N))}" for N in NS))


def solution_7(args):
    names = ["ce-N1", "limited-N64", "limited-N4-per_step=True"]
    rows = saved(args, "--task prove --frontier ", *(f"prove-{name}" for name in names))

    def of_all_seeds(runs, name):
        return np.concatenate([run["problems"][name] for run in runs])

    p = {runs[0]["label"]: of_all_seeds(runs, "p") for runs in rows}
    all_fail = np.prod([1 - own for own in p.values()], axis=0)
    p["ensemble of them all"] = 1 - all_fail ** (1 / len(names))  # each has its part of the attempts
    p["blind search"] = of_all_seeds(rows[0], "blind")
    place = np.digitize(of_all_seeds(rows[0], "length"), (7, 9, 11))
    line("steps of the shortest proof", "below 7", "7 or 8", "9 or 10", "from 11")
    for name, own in p.items():
        line(name, *(pass_at_n(own[place == i], 64).mean() for i in range(4)))


def solution_8(args):
    task, settings = passn.TASKS["search"](10, num_train=20, num_test=1), passn.SETTINGS["search"]
    kind = passn.KINDS[task.kind]
    torch.manual_seed(10)
    model = kind(task, settings, 10, "cpu").new_model()

    def gradient(num_attempts, seed=0):
        estimator = kind(task, settings | {"reinforce": num_attempts}, seed, "cpu")
        loss = estimator.objective(model, torch.arange(20), "reward", 64)
        parts = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    exact = gradient(0)
    line("", "cosine", "mean of 6")
    for n in (64, 256, 1024):
        estimates = torch.stack([gradient(n, seed) for seed in range(6)])
        cosines = torch.cosine_similarity(estimates, exact[None])
        line(f"{n} attempts", cosines.mean(), torch.cosine_similarity(estimates.mean(dim=0), exact, dim=0))


def solution_9(args):
    p = torch.arange(1, 101, dtype=torch.float64) ** -1.2
    p /= p.sum()
    torch.manual_seed(0)
    labels = torch.multinomial(p, 50, replacement=True)[:, None]
    line("", "ce", "limited")
    both = {"ce": torch.zeros(50, 100), "limited": torch.zeros(50, 100)}
    for step in range(501):
        if step in (0, 5, 10, 20, 50, 100, 200, 500):
            values = [pass_at_n(logits.softmax(dim=1), 64) @ p for logits in both.values()]
            line(f"step {step}", *(value.mean() for value in values))
        for name, logits in both.items():
            log_p = logits.requires_grad_().log_softmax(dim=1).gather(1, labels)[:, 0]
            gradient, = torch.autograd.grad(passn.LOSSES[name](log_p, 64), logits)
            both[name] = logits.detach() - 50 * gradient  # the loss is a mean over 50 problems


def solution_10(args):
    for gamma in (8, 64, 160):
        passn.LOSSES[f"focal{gamma}"] = focal_loss(gamma)
    for tries in (1, 2, 4):
        passn.LOSSES[f"stop{tries}"] = hard_stop(tries)
    names = ("focal8", "focal64", "focal160", "stop1", "stop2", "stop4")
    line("factor", "highest", "1/2 at p =")
    for name in ("limited", *names):
        log_p = torch.linspace(-9, -0.01, 10_000, requires_grad=True)
        slope, = torch.autograd.grad(10_000 * passn.LOSSES[name](log_p, 64), log_p)  # the losses are means
        line(name, -slope.min(), log_p[slope < -0.5].max().exp())
    header()
    show(args, "limited")
    show(args, "limited", pass_over=0.0)  # the others, too, pass over nothing
    for name in names:
        show(args, name)


def focal_loss(gamma):
    return lambda log_p, N: -((1 - log_p.exp()) ** gamma * log_p).mean()


def hard_stop(tries):
    """Cross-entropy for examples with p < tries / N, nothing for the others."""
    return lambda log_p, N: -log_p.clamp(max=math.log(tries / N)).mean()


def solution_11(args):
    header()
    for eps in (1e-3, 1e-8):
        for pass_over in (0.1, 0.0):
            show(args, "limited", eps=eps, pass_over=pass_over)


def solution_12(args):
    header()
    for epochs in (passn.SETTINGS["multiply"]["epochs"], 2 * passn.SETTINGS["multiply"]["epochs"]):
        show(args, "ce", 1, epochs=epochs)
        show(args, "limited", epochs=epochs)


def solution_13(args):
    header()
    for width in (32, 64, 128):
        show(args, "ce", 1, n_embd=width)
        show(args, "limited", n_embd=width)


def solution_14(args):
    passn.LOSSES["from1"] = lambda log_p, N: dco_loss(log_p, 512 ** torch.rand(len(log_p))).mean()
    passn.LOSSES["from64"] = lambda log_p, N: dco_loss(log_p, 64 * 8 ** torch.rand(len(log_p))).mean()
    header()
    show(args, "ce", 1)
    for N in (8, 64, 512):
        show(args, "limited", N)
    for name in ("from1", "from64"):
        show(args, name)


def solution_15(args):
    task = passn.TASKS["math"](0, args.math_dir)
    index, counts = task.test_answer_index, task.answer_frequencies * len(task.train[0])
    count = torch.where(index >= 0, counts[index], 0).round()  # how often each test answer is one in training
    groups = {"all": count >= 0, "0 to 5": count <= 5, "6 to 30": (count > 5) & (count <= 30), "from 31": count > 30}
    groups = {name: group for name, group in groups.items() if group.any()}
    ends, bests, rivals = {}, {}, {}  # rivals: by data set, since each model has its own
    for path in sorted(Path(args.out).glob("math*-N*.json")):  # cross-entropy comes first
        run = json.loads(path.read_text(encoding="utf-8"))
        if len(run["problems"]["p"]) != len(count):
            fail(f"{path} has other problems than {args.math_dir}")
        for rows, problems in ((ends, run["problems"]), (bests, run["problems"]["best"])):
            key = run["config"]["data"], f"{run['task']}, {run['label']}"
            rows.setdefault(key, []).append(pass_at_n(problems["p"], 64))
    if not ends:
        fail(f"{args.out} has no runs on MATH; first run python passn.py --task math --math-dir DIR --out {args.out}")

    def means(label, pass_64):
        line(label, *(pass_64[group].mean() for group in groups.values()))

    line("answer's count in training", *groups)
    line("test problems", *(f"{group.sum()}" for group in groups.values()))
    for (data, label), runs in ends.items():
        end, best = torch.stack(runs).mean(dim=0), torch.stack(bests[data, label]).mean(dim=0)  # over the seeds
        means(label, end)
        if "cross-entropy" in label:
            rivals.setdefault(data, best)
            means("cross-entropy's best epoch", best)
        elif data in rivals:
            difference = end - rivals[data]
            means("minus cross-entropy's best", difference)
            line("± standard error", *(difference[group].std() / group.sum().sqrt() for group in groups.values()))


SOLUTIONS = {name[9:]: function for name, function in [*globals().items()] if name.startswith("solution_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run the solution of an exercise.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("exercise", nargs="?", help=f"its number, 1 to {len(SOLUTIONS)}")
    parser.add_argument("--out", default="out", help="the folder of the runs")
    parser.add_argument("--math-dir", default="", help="the folder of the MATH dataset, for exercises 6 and 15")
    args = parser.parse_args(argv)
    if args.exercise not in SOLUTIONS:
        fail(f"give the number of an exercise, 1 to {len(SOLUTIONS)}, as in: python exercises/solutions.py 3")
    torch.set_num_threads(1)
    try:
        SOLUTIONS[args.exercise](args)
    except (json.JSONDecodeError, KeyError) as error:
        fail(f"a run in {args.out} is damaged, or of another version ({error!r}); remove it")
    except (OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
