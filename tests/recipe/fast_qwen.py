"""A frozen Qwen for training on CPUs: the same losses and gradients in less time.

    torchrun --nproc-per-node=2 tests/recipe/fast_qwen.py train.py ...

It runs a script of the project, with that script's flags. A prompt stands before the audio: its
keys and values never change, so they are computed once. Layers skip padding. Attention is plain
products, which take less time in bf16 than the fused kernel, in backward above all.
"""
import importlib
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from uniwhisper import (DECODERS, QwenDecoder, flat_indices, predicting, rotate,  # noqa: E402
                        token_mask)


def project(layer, x, rotary):
    """x (N, D), rotary (N, 1, D / H) each -> queries, keys and values (N, heads, D / H)."""
    a, x = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (a.split(linear(x)) for linear in (a.q_proj, a.k_proj, a.v_proj))
    return rotate(a.q_norm(q), rotary), rotate(a.k_norm(k), rotary), v


def attention(q, k, v, bias):
    """q (B, L, H, D / H), k and v (B, K, KV heads, D / H), bias (B, 1, L, K) -> (B, L, D)."""
    b, length, heads, dim = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    q = (q * dim**-0.5).transpose(1, 2).reshape(b, k.shape[1], -1, dim)  # those that share keys
    scores = (q @ k.mT).float().view(b, heads, length, -1) + bias
    y = scores.softmax(-1).to(v.dtype).view(b, k.shape[1], -1, k.shape[2]) @ v
    return y.view(b, heads, length, dim).transpose(1, 2).flatten(2)


class FastQwen(QwenDecoder):
    """P: tokens of the longest prompt; L: positions behind a prompt; N of B * L are no padding."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.known = {}  # prompt -> keys and values (layers, 2, tokens, KV heads, D / H)

    @torch.no_grad()
    def prompt_keys(self, prompts):
        """(layers, 2, B, P, KV heads, D / H), padded on the right."""
        for prompt in set(map(tuple, prompts)) - set(self.known):
            x = self.embed_tokens(torch.tensor(prompt))  # (tokens, D)
            rotary, found = self.rotary(len(prompt), x), []
            for layer in self.layers:
                found.append(torch.stack(project(layer, x, [t[:, None] for t in rotary])[1:]))
                x = layer(x[None], rotary)[0]
            self.known[prompt] = torch.stack(found)
        known = [self.known[tuple(prompt)].transpose(0, 2) for prompt in prompts]
        return torch.nn.utils.rnn.pad_sequence(known).permute(3, 2, 1, 0, 4, 5)

    def answer_states(self, audio, lengths, prompts, answers):
        if self.lm_head.weight.requires_grad:
            raise ValueError("fast_qwen.py needs a frozen decoder: leave out --lr-decoder")
        chats = self.layout(lengths, [[]] * len(prompts), answers)  # behind the prompts
        x = self.embed(chats, audio, lengths).to(self.embed_tokens.weight.dtype)  # (B, L, D)
        length, before = x.shape[1], torch.tensor([len(prompt) for prompt in prompts])
        real = token_mask(torch.tensor([len(chat) for chat in chats]), length)  # (B, L)
        places = flat_indices(real, x.device)  # (N,)

        def spread(x):  # (N, ...) -> (B, L, ...), zeros as padding
            full = x.new_zeros(real.numel(), *x.shape[1:])
            return full.index_copy(0, places, x).unflatten(0, real.shape)

        with self.autocast(x.device):
            known = self.prompt_keys(prompts)
            seen = token_mask(before, known.shape[3])[:, None].expand(-1, length, -1)
            causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(real), -1, -1)
            seen = torch.cat((seen, causal), 2)[:, None]  # (B, 1, L, P + L)
            bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
            positions = (before[:, None] + torch.arange(length))[real]
            tables = self.rotary(known.shape[3] + length, x)
            rotary = [table[positions][:, None] for table in tables]  # (N, 1, D / H)
            x = x.flatten(0, 1).index_select(0, places)  # (N, D)
            for layer, (past_k, past_v) in zip(self.layers, known):
                q, k, v = map(spread, project(layer, x, rotary))
                y = attention(q, torch.cat((past_k, k), 1), torch.cat((past_v, v), 1), bias)
                x = x + layer.self_attn.o_proj(y.flatten(0, 1).index_select(0, places))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            return predicting(spread(self.norm(x)), chats, answers)


if __name__ == "__main__":
    DECODERS.update(qwen2=FastQwen, qwen3=FastQwen)
    sys.argv = sys.argv[1:]  # the script and its flags
    importlib.import_module(Path(sys.argv[0]).stem).main()
