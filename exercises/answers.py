"""The functions that students write in lesson.ipynb and in the exercises, each as short as it can be and pass its check:

    python exercises/check.py exercises/answers.py
"""

import math

import torch


def pass_at_n(p, N):
    return 1 - (1 - p) ** N


def estimate_pass_at_n(n, c, N):
    return 1 - math.comb(n - c, N) / math.comb(n, N)  # of whole numbers, so nothing overflows


def log_p_of(logits, labels):
    return logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]


def limited_loss(log_p, N):
    log_fail = torch.log1p(-log_p.clamp(max=-1e-6).exp())  # log(1 - p), finite at p = 1
    return -torch.log(-torch.expm1(N * log_fail)).mean()


def overconfidence_factor(p, N):
    return N * p * (1 - p) ** (N - 1) / -torch.expm1(N * torch.log1p(-p))


def weighted_loss(log_p, N):
    F = overconfidence_factor(log_p.exp(), N).detach()
    return -(F * log_p).mean()


def reward_weight(p, N):
    return N * p * (1 - p) ** (N - 1)


def advantages(rewards, N):
    n, counts = rewards.shape[1], rewards.sum(dim=1).int().tolist()
    others_fail = [math.comb(n - c, N - 1) / math.comb(n - 1, N - 1) for c in counts]
    return N / n * torch.tensor(others_fail)[:, None] * rewards


def optimal_policy(p, N):
    if N == 1:
        return torch.eye(len(p), dtype=p.dtype)[p.argmax()]
    low, high = 0.0, p.max().item()
    for _ in range(100):
        level = (low + high) / 2
        q = (1 - (level / p) ** (1 / (N - 1))).clamp(min=0)
        low, high = (level, high) if q.sum() > 1 else (low, level)
    return q


def effective_number(p):
    return p.sum() ** 2 / (p**2).sum()


def proof_p(theorem, policy, depth):
    if depth == 0:
        return 0.0
    return sum(probability * math.prod(proof_p(goal, policy, depth - 1) for goal in goals)
               for probability, goals in policy[theorem].values())


def focal_loss(log_p, gamma):
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def hard_stop(log_p, N, k):
    return -log_p.clamp(max=math.log(k / N)).mean()


def smoothed_log_p(logits, labels, share):
    log_ps = logits.log_softmax(dim=1)
    return (1 - share) * log_ps.gather(1, labels[:, None])[:, 0] + share * log_ps.mean(dim=1)


def penalized_log_p(logits, labels, beta):
    log_ps = logits.log_softmax(dim=1)
    return log_ps.gather(1, labels[:, None])[:, 0] - beta * (log_ps.exp() * log_ps).sum(dim=1)


def maxrl_loss(log_p, N):
    return sum((1 - log_p.exp()) ** k / k for k in range(1, N + 1)).mean()


def grpo_loss(log_p):
    return -2 * log_p.exp().clamp(max=1 - 1e-6).sqrt().asin().mean()  # at p = 1 the slope is infinite


def power_loss(log_p, N, power):
    log_fail = torch.log1p(-log_p.clamp(max=-1e-6).exp())
    return -((-torch.expm1(N * log_fail)) ** power / power).mean()
