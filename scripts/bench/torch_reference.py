"""Serve lerobot's PyTorch wall_x model over pipes, for scripts/benchmark.py --compare-torch, which starts it.

    python scripts/bench/torch_reference.py MODEL_DIR INPUTS.npz

Runs in a separate environment (`make torch-reference`), since its dependencies differ from those of this package. Reads
one command per line and answers each with one line of JSON: "chunk STEPS" samples an action chunk with the model's own
`predict`, "actions" returns the last one, "train" makes one update with AdamW. INPUTS.npz contains the arrays of a flow
batch in Hugging Face's format, and the initial noise.
"""

import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.wall_x import modeling_wall_x as wall_x
from safetensors.torch import load_file


def load(folder: Path, tokens: dict[str, int]) -> torch.nn.Module:
    """Load the float32 reference model with the weights of a Wall-X directory in upstream's layout, strictly.

    A directory with a tokenizer is read by lerobot's own loader, which needs processor and tokenizer files.
    """
    if (folder / "tokenizer.json").is_file():
        model = wall_x.Qwen2_5_VLMoEForAction.from_pretrained(folder)
    else:
        config = wall_x.Qwen2_5_VLConfig(**json.loads((folder / "config.json").read_text("utf-8")))
        config._attn_implementation = "eager"
        names = {"<|propri|>": tokens["propri"], "<|action|>": tokens["action"]}
        tokenizer = types.SimpleNamespace(convert_tokens_to_ids=names.get)
        model = wall_x.Qwen2_5_VLMoEForAction(config, processor=types.SimpleNamespace(tokenizer=tokenizer))
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    check(model.state_dict(), load_file(folder / "model.safetensors"))
    return model.float().eval()


def check(loaded: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    """Check that every tensor was loaded: both loading paths silently skip tensors that do not fit."""
    stored = {name: x for name, x in stored.items() if "normalizer" not in name}
    if "lm_head.weight" in loaded and "lm_head.weight" not in stored:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    common = stored.keys() & loaded.keys()
    problems = {
        "missing": sorted(loaded.keys() - common),
        "unexpected": sorted(stored.keys() - common),
        "not loaded": sorted(x for x in common if not torch.equal(stored[x], loaded[x].to(stored[x].dtype))),
    }
    if any(problems.values()):
        raise SystemExit(f"weights do not fit lerobot's model: {problems}")


def main() -> None:
    folder, inputs = Path(sys.argv[1]), dict(np.load(sys.argv[2]))
    tokens = json.loads(str(inputs.pop("tokens")))
    model = load(folder, tokens)
    arrays = {name: torch.tensor(value) for name, value in inputs.items()}
    noise = arrays.pop("noise")
    batch, horizon, channels = noise.shape
    # `predict` draws its noise with torch.randn, and rounds the state's embedding to bfloat16, which a float32 model
    # cannot accept: both are patched here, so that it computes the same as this package.
    wall_x.torch = types.SimpleNamespace(**vars(torch))
    wall_x.torch.randn = lambda size, **_: noise.clone()
    wall_x.torch.bfloat16 = torch.float32
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)

    actions, optimizer = None, torch.optim.AdamW(model.parameters(), lr=9e-5, weight_decay=0.1)
    chunk = arrays.pop("action_chunk")
    for line in sys.stdin:
        command, *argument = line.split()
        start = time.perf_counter()
        answer = {}
        if command == "chunk":
            with torch.no_grad():
                actions = model.predict(
                    "diffusion", horizon, channels, num_inference_timesteps=int(argument[0]), **arrays
                )["predict_action"]
        elif command == "actions":
            answer["actions"] = actions.tolist()
        elif command == "train":
            loss = model.train()(mode="train", action_chunk=chunk, **arrays).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            answer["loss"] = loss.item()
        else:
            raise SystemExit(f"no such command: {command}")
        answer["ms"] = 1e3 * (time.perf_counter() - start)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
