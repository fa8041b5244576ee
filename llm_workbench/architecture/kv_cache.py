import torch

class NoCache:
    "No past: every call sees only its own tokens."
    def positions(self, n_tokens, device=None): return torch.arange(n_tokens, device=device)
    def attend(self, layer, q, k, v, *, attention, **kind): return attention(q, k, v, **kind)
    def advance(self, n_tokens, counts=None): pass

class ContiguousCache:
    "Every key and value, in one tensor per layer that grows by doubling."
    def __init__(self, n_layers):
        self.lengths = 0                      # tokens held: an int while all rows agree, (B,) int64 once they do not
        self.k, self.v = [None] * n_layers, [None] * n_layers   # (B, capacity, K, D), (B, capacity, K, Dv)
    def positions(self, n_tokens, device=None):
        new = torch.arange(n_tokens, device=device)
        return new + (self.lengths if isinstance(self.lengths, int) else self.lengths[:, None])
    def attend(self, layer, q, k, v, *, attention, **kind):
        T = q.shape[1]
        k, v = self._append(self.k, layer, k), self._append(self.v, layer, v)
        if isinstance(self.lengths, int): return attention(q, k, v, **kind)
        return attention(q, k, v, lengths=self.lengths + T, **kind)
    def _append(self, store, layer, new):
        B, T = new.shape[:2]
        ragged = not isinstance(self.lengths, int)
        end = (int(self.lengths.max()) if ragged else self.lengths) + T
        old = store[layer]
        if old is None or old.shape[1] < end:
            grown = new.new_zeros(B, max(end, 64, 2 * (0 if old is None else old.shape[1])), *new.shape[2:])
            if old is not None: grown[:, :old.shape[1]] = old
            store[layer] = grown
        if ragged: store[layer][torch.arange(B, device=new.device)[:, None], self.positions(T, new.device)] = new
        else: store[layer][:, self.lengths:end] = new
        return store[layer][:, :end]
    def advance(self, n_tokens, counts=None):
        "Move on by `n_tokens`, or by `counts` (B,) where rows are padded on the right to unequal lengths."
        if counts is not None and isinstance(self.lengths, int): self.lengths = counts.new_full(counts.shape, self.lengths)
        self.lengths = self.lengths + (n_tokens if counts is None else counts)
