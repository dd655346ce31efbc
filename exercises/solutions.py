"""The exercises' solutions, one function each. Run them in the folder of passn.py:

    python exercises/solutions.py 3
    python exercises/solutions.py 6 --math-dir DIR

Runs are read from the folder --out, and new ones are saved there. A run that is there is not trained again.
"""

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of passn.py

import passn
import toy_tasks
from passn import COLUMNS, dco_loss, estimate_pass_at_n, fail, optimal_policy, pass_at, pass_at_n


def line(label, *cells):
    """Print a line of a table: texts as they are, numbers with three digits."""
    texts = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    print(f"{label:40}", *(f"{text:>10}" for text in texts))


def path_of(args, task, label, seed=10):
    return Path(args.out, f"{task}-{label}-seed{seed}.json".replace(", ", "-").replace(" ", "-"))


def read(path):
    """A saved run."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        passn.row_of(run)  # an error where a number is missing or impossible
        return run
    except Exception as error:  # whatever it is
        fail(f"{path} is no run of this version ({error!r}); remove it")


def saved(args, task, flags):
    """For each label a list of runs: those of the seeds 10 to 12 that the folder has for every label.
    flags: {label: the flags of passn.py for such runs}."""
    paths = [[path_of(args, task, label, seed) for label in flags] for seed in (10, 11, 12)]
    complete = [row for row in paths if all(path.is_file() for path in row)]
    if not complete:
        label = next(label for label, path in zip(flags, paths[0]) if not path.is_file())
        command = f"python passn.py {flags[label]}--seed 10 --seeds 3 --out {shlex.quote(args.out)}"
        fail(f"{args.out} does not have the runs {label} on {task}; first run {command}")
    return [[read(path) for path in row] for row in zip(*complete)]


def p_of(run, epoch=-1):
    return run["history"][epoch]["p"][0]  # at temperature 1


def show(args, loss, N=64, **changes):
    """Print a line on the run on multiply with seed 10 and these settings: from the folder, or else trained now."""
    config = passn.configure("multiply", loss, N, 10, **changes)
    path = path_of(args, "multiply", passn.new_run("multiply", config, passn.TASKS["multiply"], 64)["label"])
    run = read(path) if path.is_file() else passn.train("multiply", loss, N, seed=10, out=args.out, **changes)[0]
    end, at_end = run["history"][-1], [pass_at(run, n)[-1, 0] for n in COLUMNS]
    line(run["label"], *at_end, end["confidence"], end["train_p"], pass_at(run, 64)[:, 0].max(), f"{end['updates']}")


def header():
    line("", *(f"pass@{n}" for n in COLUMNS), "confidence", "train p", "best@64", "updates")


def solution_1(args):
    [[run, *_]] = saved(args, "multiply", {"cross-entropy": ""})
    line("", "pass@1", "pass@64", "confidence")
    for record, pass_1, pass_64 in zip(run["history"], pass_at(run, 1)[:, 0], pass_at(run, 64)[:, 0]):
        line(f"epoch {record['epoch']}", pass_1, pass_64, record["confidence"])


def solution_2(args):
    line("", "best@64", "at T", "in epoch", "at the end", "at T")
    for runs in saved(args, "multiply", {"cross-entropy": "", "limited N=64": ""}):
        for run in runs:
            pass_64, T = pass_at(run, 64), run["temperatures"]
            epoch, best = np.unravel_index(pass_64.argmax(), pass_64.shape)
            chosen = pass_64.max(), T[best], f"{run['history'][epoch]['epoch']}"
            line(f"{run['label']}, seed {run['seed']}", *chosen, pass_64[-1].max(), T[pass_64[-1].argmax()])


def solution_3(args):
    [[run, *_]] = saved(args, "multiply", {"limited N=64": ""})
    p = torch.tensor(p_of(run), dtype=torch.float64)
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
    labels = ("cross-entropy", "limited N=8", "limited N=64", "limited N=512")
    rows = saved(args, "multiply", dict.fromkeys(labels, "--frontier "))
    at_end = np.array([[[pass_at(run, 2**i)[-1, 0] for i in range(10)] for run in runs] for runs in rows]).mean(axis=1)
    behind = at_end.max(axis=0) - at_end  # (training Ns, budgets)
    line("", "mean", "behind")
    for i, label in enumerate(labels):
        line(label, at_end[i].mean(), behind[i].max())


def solution_5(args):
    log_p = torch.tensor([-20.0, -10, -6, -4, -1], requires_grad=True)
    line("log p", *(f"{value:.0f}" for value in log_p))
    for name, loss in passn.LOSSES.items():
        gradient, = torch.autograd.grad(loss(log_p, 64), log_p)
        line(f"weights by {name}", *-gradient)
    header()
    for name in ("ce", "limited", "reward"):
        show(args, name)


def solution_6(args):
    task = passn.TASKS["math"](0, args.math_dir)
    line("", *(f"pass@{n}" for n in COLUMNS))
    by_N = [[pass_at_n(p, N).mean() for p in passn.guessers(task, N).values()] for N in COLUMNS]
    for name, values in zip(("by frequency", "as the limited loss tends", "optimal"), zip(*by_N)):
        line(name, *values)
    p = [*task.frequencies.values()]
    line(f"of {len(p)} answers, optimal keeps", *(f"{np.count_nonzero(optimal_policy(p, N))}" for N in COLUMNS))


def solution_7(args):
    flags = {"cross-entropy": "", "limited N=64": "", "limited N=4, per_step=True": "--loss limited --N 4 --per-step "}
    rows = saved(args, "prove", {label: "--task prove " + own for label, own in flags.items()})
    p = {label: np.array([p_of(run) for run in runs]) for label, runs in zip(flags, rows)}
    all_fail = np.prod([1 - own for own in p.values()], axis=0)
    p["ensemble of them all"] = 1 - all_fail ** (1 / len(flags))  # each has its part of the attempts
    p["blind search"] = np.array([run["baselines"]["blind search"] for run in rows[0]])
    sizes = [(run["seed"], run["config"]["num_train"], run["config"]["num_test"]) for run in rows[0]]
    theorems = [toy_tasks.draw_theorems(*size)[1] for size in sizes]
    place = np.digitize([[toy_tasks.solve(theorem)[0] for theorem in own] for own in theorems], (7, 9, 11))
    line("steps of the shortest proof", "below 7", "7 or 8", "9 or 10", "from 11")
    for name, own in p.items():
        line(name, *(pass_at_n(own[place == i], 64).mean() for i in range(4)))


def solution_8(args):
    task, theorems = passn.TASKS["search"](10, num_train=20, num_test=1), torch.arange(20)
    torch.manual_seed(10)
    model = task.new_model(passn.GPT)

    def gradient(loss):
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*model.parameters()])])

    def estimate(seed):
        torch.manual_seed(seed)
        return gradient(passn.reinforce_loss(*task.sample_tries(model, theorems), 64))

    exact = gradient(passn.reward_loss(task.log_p(model, theorems), 64))
    line("", "cosine", "mean of 6")
    for task.reinforce in (64, 256, 1024):
        estimates = torch.stack([estimate(seed) for seed in range(6)])
        cosines = torch.cosine_similarity(estimates, exact[None])
        line(f"{task.reinforce} attempts", cosines.mean(), torch.cosine_similarity(estimates.mean(dim=0), exact, dim=0))


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
        passn.LOSSES[f"focal{gamma}"] = lambda log_p, N, gamma=gamma: -((1 - log_p.exp()) ** gamma * log_p).mean()
    for k in (1, 2, 4):
        passn.LOSSES[f"stop{k}"] = lambda log_p, N, k=k: -log_p.clamp(max=math.log(k / N)).mean()
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


def solution_11(args):
    header()
    for eps in (1e-3, 1e-8):
        for pass_over in (0.1, 0.0):
            show(args, "limited", eps=eps, pass_over=pass_over)


def solution_12(args):
    usual, _ = passn.settings_of("multiply")["epochs"]
    header()
    for epochs in (usual, 2 * usual):
        for loss in ("ce", "limited"):
            show(args, loss, epochs=epochs)


def solution_13(args):
    header()
    for width in (32, 64, 128):
        for loss in ("ce", "limited"):
            show(args, loss, n_embd=width)


def solution_14(args):
    passn.LOSSES["from1"] = lambda log_p, N: dco_loss(log_p, 512 ** torch.rand(len(log_p))).mean()
    passn.LOSSES["from64"] = lambda log_p, N: dco_loss(log_p, 64 * 8 ** torch.rand(len(log_p))).mean()
    header()
    for loss, N in (("ce", 1), ("limited", 8), ("limited", 64), ("limited", 512), ("from1", 64), ("from64", 64)):
        show(args, loss, N)


def solution_15(args):
    task = passn.TASKS["math"](0, args.math_dir)
    count = np.array([round(task.frequencies.get(answer, 0) * task.size) for answer in task.test_answers])
    groups = {"all": count >= 0, "0 to 5": count <= 5, "6 to 30": (count > 5) & (count <= 30), "from 31": count > 30}
    groups = {name: group for name, group in groups.items() if group.any()}
    rows = {}  # {(task, data, label): runs}
    for path in sorted(Path(args.out).glob("math-*.json")):
        run = read(path)
        key = name, data, _ = run["task"], run["config"]["data"], run["label"]
        if len(p_of(run)) != len(count) or name == "math" and data != task.data:
            fail(f"{path} has other problems than {args.math_dir}")
        rows.setdefault(key, []).append(run)
    if not rows:
        fail(f"{args.out} has no runs on MATH; first run python passn.py --task math --math-dir DIR "
             f"--loss ce limited reward --N 64 --seed 10 --seeds 3 --out {shlex.quote(args.out)}")

    def pass_64(runs, in_best_epoch):  # of each problem, mean over the seeds
        epochs = [pass_at(run, 64)[:, 0].argmax() if in_best_epoch else -1 for run in runs]
        return torch.stack([pass_at_n(p_of(run, epoch), 64) for run, epoch in zip(runs, epochs)]).mean(dim=0).numpy()

    def means(label, values):
        line(label, *(values[group].mean() for group in groups.values()))

    line("answer's count in training", *groups)
    line("test problems", *(f"{group.sum()}" for group in groups.values()))
    for (name, data, label), runs in sorted(rows.items()):
        end, rival = pass_64(runs, False), rows.get((name, data, "cross-entropy"))
        best = pass_64(rival, True) if rival else None
        means(f"{name}, {label}", end)
        if runs is rival:
            means("cross-entropy's best epoch", best)
        elif rival:
            means("minus cross-entropy's best", end - best)
            errors = ((end - best)[group].std(ddof=1) / math.sqrt(group.sum()) for group in groups.values())
            line("± standard error", *errors)


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
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nsolutions.py: interrupted; the runs that were finished are kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyError as error:
        fail(f"a run in {args.out} does not have {error}; remove it")
    except (OSError, ValueError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    main()
