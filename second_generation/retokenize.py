"""Give a pipeline folder the tokenizer of today: `python -m second_generation.retokenize FOLDER`.

A token that the old tokenizer had keeps its embedding; a new one, a word that was split before, begins with the mean of
its pieces.
"""

import sys
from pathlib import Path

import torch

from helpers.minisd import architecture
from helpers.minisd.pretrain import finished_parts
from helpers.world.captions import vocabulary_corpus

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    old = finished_parts(folder, ("tokenizer", "text_encoder", "vae", "unet"))
    new = architecture.build(architecture.MINI, vocabulary_corpus(20000, seed=0))
    state = old["text_encoder"].state_dict()
    name = next(key for key in state if "token_embedding" in key)
    pieces = old["tokenizer"].get_vocab()
    table = torch.empty(len(new["tokenizer"]), state[name].shape[1])
    for token, row in new["tokenizer"].get_vocab().items():
        known = [token] if token in pieces else old["tokenizer"].tokenize(token.removesuffix("</w>"))
        table[row] = state[name][[pieces[piece] for piece in known]].mean(0)
        if token not in pieces:
            print(token, known)
    state[name] = table
    new["text_encoder"].load_state_dict(state)
    architecture.save({**old, **{key: new[key] for key in ("tokenizer", "text_encoder", "scheduler")}}, folder)
