"""An engine in a process of its own, for settings that cannot share one: what it says, as JSON on the last
line.

    engine_child.py BASE SETTINGS [NAME=PACKAGE]...     SETTINGS: JSON; "compile": true turns torch.compile on,
                                                        "pieces" vLLM's own compilation, in pieces

vLLM turns torch.compile off for every engine with adapters on the CPU. With "compile" that one line of its
platform is undone, here in the test, to see the graphs that a GPU's engine would trace. With "pieces" they are
cut where a GPU's engine that leaves mixtures out of its graphs cuts them: what each piece calls is said, too.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import engines
import xorz.vllm


def compiling(in_pieces):
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    plain = CpuPlatform.check_and_update_config.__func__

    def check(cls, config):
        plain(cls, config)
        if config.model_config is not None:
            own = config.compilation_config
            own.mode = CompilationMode.VLLM_COMPILE if in_pieces else CompilationMode.DYNAMO_TRACE_ONCE
            own.backend = "inductor"
            if in_pieces:
                from xorz.vllm.pieces import OP

                own.set_splitting_ops_for_v1("")
                own.splitting_ops.append(OP)
                own.compile_sizes = []  # which comes with the sizes of graphs

    CpuPlatform.check_and_update_config = classmethod(check)


def cut():
    """Pieces of the graphs that vLLM cuts from now on: whether each is left out of CUDA graphs, and the ops that it calls."""
    from vllm.compilation import backends

    plain, out = backends.split_graph, []

    def split_graph(graph, ops):
        whole, pieces = plain(graph, ops)
        for piece in pieces:
            called = [str(node.target) for node in piece.graph.graph.nodes if node.op == "call_function"]
            out.append([piece.is_splitting_graph, called])
        return whole, pieces

    backends.split_graph = split_graph
    return out


def main():
    base, settings = sys.argv[1], json.loads(sys.argv[2])
    named = dict(word.split("=", 1) for word in sys.argv[3:])
    compiled = settings.pop("compile", False)
    pieces = cut()
    if compiled:
        compiling(compiled == "pieces")
        settings["enforce_eager"] = False
    llm = engines.engine(base, **settings)
    adapters = {None: None} | {name: xorz.vllm.load(llm, name, package) for name, package in named.items()}
    rounds = []
    names = list(adapters)
    for _ in range(
        2
    ):  # the second after every slot has changed hands, where there are more tenants than slots
        llm.reset_prefix_cache()
        prompts = [p for _ in names for p in engines.PROMPTS]
        got = engines.ask(llm, prompts, [adapters[n] for n in names for _ in engines.PROMPTS])
        rounds.append([[s.tokens, s.logprob] for s in got])
    out = {"rounds": rounds, "pieces": pieces, "memory": llm.collective_rpc("xorz_memory")}
    if compiled:
        from torch._dynamo.utils import counters

        out["graphs"] = dict(counters["stats"])
        out["breaks"] = dict(counters["graph_break"])
    print("\n" + json.dumps(out), flush=True)
    engines.stop(llm)


if __name__ == "__main__":
    main()
