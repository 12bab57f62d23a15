"""DSpark once more, in numpy and float64, written from the equations of its description.

One row at a time and one thing after the other; nothing of the model is used but its weights. `bug`
names a mistake that others made, so that a test can show that it would be seen.
"""

import numpy as np

BUGS = (
    "causal mask in the block",
    "window slides in the block",
    "anchor instead of noise",
    "queries one position early",
    "no shared expert",
    "rows of the last position missing",
    "confidence after the norm",
    "markov of the token itself",
)


class Reference:
    """A draft by its config and variables.

    Attributes:
      config, params, buffers: the model's, as numpy arrays.
    """

    def __init__(self, config, variables, bug=None):
        self.config, self.bug = config, bug
        self.params, self.buffers = variables["params"], variables["buffers"]
        self.stages = [f"draft_{s}" for s in range(config.draft_layers)]

    def ring_rows(self, features):
        """Each stage's rows [S][n,H] of positions 0 .. n-1."""
        first = self.params[self.stages[0]]
        f = features.astype(np.float64) @ first["main_proj"]["weight"].T.astype(np.float64)
        f = self.norm(f, first["main_norm"])
        position = np.arange(len(features))
        return [self.kv(self.params[s]["block"]["attn"], f, position) for s in self.stages]

    def propose(self, features, anchor, pick):
        """Drafts, their logits, and the logits of their confidences.

        Args:
          features: [p+1, L*D] of every position that was run. pick: logits [V] -> token.
        """
        config, sizes = self.config, self.config.dspark
        p, gamma = len(features) - 1, sizes.block_size
        rows = [r[max(0, p + 1 - config.sliding_window) :] for r in self.ring_rows(features)]
        if self.bug == "rows of the last position missing":
            rows = [r[:-1] for r in rows]
        noise = anchor if self.bug == "anchor instead of noise" else sizes.noise_token_id
        ids = [anchor] + [noise] * (gamma - 1)
        embed = self.params["embed"]["weight"][ids].astype(np.float64)
        x = np.repeat(embed[:, None], config.hc_mult, axis=1)
        position = p + 1 + np.arange(gamma) - (self.bug == "queries one position early")
        for name, ring in zip(self.stages, rows, strict=True):
            x = self.stage(
                self.params[name]["block"], self.buffers[name]["block"], x, ring, position
            )
        last = self.params[self.stages[-1]]
        y = self.head(x, last.get("hc_head"))
        normed = self.norm(y, last["norm"])
        base = normed @ self.params["head"]["weight"].T.astype(np.float64)
        return self.heads(
            last, base, normed if self.bug == "confidence after the norm" else y, anchor, pick
        )

    def heads(self, last, base, y, anchor, pick):
        w1 = last["markov_head"]["markov_w1"]["weight"].astype(np.float64)
        w2 = last["markov_head"]["markov_w2"]["weight"].astype(np.float64)
        w = last["confidence_head"]["proj"]["weight"][0].astype(np.float64)
        token, drafts, logits, confidences = anchor, [], [], []
        for i in range(self.config.dspark.block_size):
            e = w1[token]
            found = base[i] + w2 @ (w1[anchor] if self.bug == "markov of the token itself" else e)
            token = pick(found)
            drafts.append(token)
            logits.append(found)
            confidences.append(w @ np.concatenate([y[i], e]))
        return np.array(drafts), np.array(logits), np.array(confidences)

    def stage(self, block, buffers, x, ring, position):
        u, post, mix = self.pre(x, block.get("hc_attn"))
        x = self.post(
            self.attention(block["attn"], self.norm(u, block["attn_norm"]), ring, position),
            x,
            post,
            mix,
        )
        u, post, mix = self.pre(x, block.get("hc_ffn"))
        return self.post(
            self.moe(block["ffn"], buffers["ffn"], self.norm(u, block["ffn_norm"])), x, post, mix
        )

    def attention(self, attn, v, ring, position):
        config = self.config
        n, h, gamma = config.num_attention_heads, config.head_dim, len(v)
        q = self.norm(self.times(v, attn["wq_a"]), attn["q_norm"])
        q = self.times(q, attn["wq_b"]).reshape(gamma, n, h)
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        q = self.turn(q, position[:, None], 1)
        block = self.kv(attn, v, position)
        out = np.zeros((gamma, n, h))
        for i in range(gamma):
            keys = np.concatenate([ring, block])
            if self.bug == "causal mask in the block":
                keys = np.concatenate([ring, block[: i + 1]])
            if self.bug == "window slides in the block":
                full = len(ring) == config.sliding_window
                keys = np.concatenate([ring[i + 1 if full else 0 :], block])
            score = q[i] @ keys.T * h**-0.5
            sink = attn["attn_sink"].astype(np.float64)
            top = np.maximum(score.max(-1), sink)
            weight = np.exp(score - top[:, None])
            out[i] = weight @ keys / (weight.sum(-1) + np.exp(sink - top))[:, None]
        out = self.turn(out, position[:, None], -1)
        groups = config.o_groups
        out = out.reshape(gamma, groups, -1)
        down = attn["wo_a"]["weight"].astype(np.float64).reshape(groups, config.o_lora_rank, -1)
        return self.times(np.einsum("tgx,gox->tgo", out, down).reshape(gamma, -1), attn["wo_b"])

    def kv(self, attn, v, position):
        return self.turn(self.norm(self.times(v, attn["wkv"]), attn["kv_norm"]), position, 1)

    def turn(self, x, position, sign):
        """RoPE of pairs (2i, 2i + 1) of the last channels."""
        config = self.config
        r = config.qk_rope_head_dim
        frequency = config.rope_theta ** (-np.arange(0, r, 2) / r)
        angle = sign * np.asarray(position)[..., None] * frequency
        x = x.copy()
        a, b = x[..., -r::2].copy(), x[..., -r + 1 :: 2].copy()
        x[..., -r::2] = a * np.cos(angle) - b * np.sin(angle)
        x[..., -r + 1 :: 2] = a * np.sin(angle) + b * np.cos(angle)
        return x

    def moe(self, ffn, buffers, v):
        config = self.config
        score = np.sqrt(np.logaddexp(0, v @ ffn["gate"]["weight"].T.astype(np.float64)))
        biased = score + buffers["gate"]["bias"]
        out = np.zeros_like(v)
        for t in range(len(v)):
            chosen = np.argsort(-biased[t], kind="stable")[: config.num_experts_per_tok]
            share = score[t, chosen] / score[t, chosen].sum() * config.routed_scaling_factor
            for w, e in zip(share, chosen, strict=True):
                matrices = [ffn["experts"][name][e] for name in ("w1", "w2", "w3")]
                out[t] += self.expert(v[t], *matrices, w)
        if not config.n_shared_experts:
            return out
        shared = [ffn["shared_experts"][name]["weight"] for name in ("w1", "w2", "w3")]
        return out if self.bug == "no shared expert" else out + self.expert(v, *shared, 1.0)

    def expert(self, v, w1, w2, w3, weight):
        limit = self.config.swiglu_limit
        gate = np.minimum(v @ w1.T.astype(np.float64), limit)
        up = np.clip(v @ w3.T.astype(np.float64), -limit, limit)
        return (weight * gate / (1 + np.exp(-gate)) * up) @ w2.T.astype(np.float64)

    def pre(self, x, hc):
        config, m = self.config, self.config.hc_mult
        if m == 1:  # a plain residual
            return x[:, 0], np.ones((len(x), 1)), np.ones((len(x), 1, 1))
        flat = x.reshape(len(x), -1)
        mix = flat @ hc["fn"].T.astype(np.float64)
        mix = mix / np.sqrt((flat**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        scale, base = hc["scale"].astype(np.float64), hc["base"].astype(np.float64)
        pre = _sigmoid(mix[:, :m] * scale[0] + base[:m]) + config.hc_eps
        post = 2 * _sigmoid(mix[:, m : 2 * m] * scale[1] + base[m : 2 * m])
        a = (mix[:, 2 * m :] * scale[2] + base[2 * m :]).reshape(-1, m, m)
        a = np.exp(a - a.max(-1, keepdims=True))
        a = a / a.sum(-1, keepdims=True) + config.hc_eps
        a = a / (a.sum(1, keepdims=True) + config.hc_eps)
        for _ in range(config.hc_sinkhorn_iters - 1):
            a = a / (a.sum(2, keepdims=True) + config.hc_eps)
            a = a / (a.sum(1, keepdims=True) + config.hc_eps)
        return np.einsum("tm,tmd->td", pre, x), post, a

    def post(self, y, x, post, a):
        return post[:, :, None] * y[:, None] + np.einsum("tij,tid->tjd", a, x)

    def head(self, x, hc):
        if self.config.hc_mult == 1:
            return x[:, 0]
        flat = x.reshape(len(x), -1)
        mix = flat @ hc["fn"].T.astype(np.float64)
        mix = mix / np.sqrt((flat**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        pre = _sigmoid(mix * hc["scale"] + hc["base"]) + self.config.hc_eps
        return np.einsum("tm,tmd->td", pre, x)

    def norm(self, x, weight):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return x / scale * weight["weight"].astype(np.float64)

    def times(self, x, matrix):
        return x @ matrix["weight"].T.astype(np.float64)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))
