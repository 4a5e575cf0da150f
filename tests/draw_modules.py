"""Draw which module builds on which, from their imports: python tests/draw_modules.py

Writes notebooks/images/modules.png. A module stands above all that it imports; an arrow leads to what it
imports, and is left out where other arrows lead there by a detour.
"""
from pathlib import Path

import matplotlib.pyplot as plt
from test_imports import NUMBER, ROOT, imports_of

PARTS = [("pieces, 00 to 06", range(0, 7), "C0"), ("model, 07 and 08", range(7, 9), "C3"),
         ("text, 09 and 10", range(9, 11), "C2"), ("training, 11 and 12", range(11, 13), "C1"),
         ("beyond, 13 to 16", range(13, 17), "C4")]


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports and that no other of its imports imports, directly or not."""
    direct = {module: imports_of(module) & NUMBER.keys() for module in NUMBER}
    def reach(module): return direct[module].union(*map(reach, direct[module]))
    below = {module: reach(module) for module in direct}
    return {module: {name for name in names if not any(name in below[other] for other in names)}
            for module, names in direct.items()}


def places(edges: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """Module -> its place: one row above the highest that it imports, near the middle of its neighbours."""
    def height(module): return 1 + max(map(height, edges[module]), default=-1)
    rows = {}
    for module in edges: rows.setdefault(height(module), []).append(module)
    neighbours = {m: edges[m] | {other for other in edges if m in edges[other]} for m in edges}
    x = {module: i - len(row) / 2 for row in rows.values() for i, module in enumerate(row)}
    for _ in range(30):
        for row in rows.values():
            wanted = {m: sum(x[n] for n in neighbours[m]) / max(1, len(neighbours[m])) for m in row}
            middle = sum(wanted.values()) / len(row)
            for i, module in enumerate(sorted(row, key=lambda m: (wanted[m], m))):
                x[module] = middle + (i - (len(row) - 1) / 2) * 1.9
    return {module: (x[module], level) for level, row in rows.items() for module in row}


def main(path: Path = ROOT / "notebooks" / "images" / "modules.png") -> None:
    edges = graph()
    place = places(edges)
    colour = {module: c for module, n in NUMBER.items() for _, span, c in PARTS if n in span}
    arrow = dict(arrowstyle="-|>", color="0.72", lw=0.8, mutation_scale=7)
    fig, ax = plt.subplots(figsize=(11, 9))
    for module, names in edges.items():
        for name in names:
            (x, y), (end, low) = place[module], place[name]
            ax.annotate("", (end, low + 0.26), (x, y - 0.26), arrowprops=arrow, zorder=0)
    for module, (x, y) in place.items():
        ax.text(x, y, module, ha="center", va="center", fontsize=8.5, zorder=2,
                bbox=dict(boxstyle="round,pad=0.35", fc="white", ec=colour[module], lw=1.4))
    for label, _, c in PARTS: ax.plot([], [], "s", mfc="white", mec=c, mew=1.4, ms=9, label=label)
    ax.legend(loc="upper left", frameon=False)
    xs, ys = zip(*place.values())
    ax.set(xlim=(min(xs) - 1, max(xs) + 1), ylim=(-0.6, max(ys) + 0.6))
    ax.axis("off")
    fig.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    plt.style.use("optimus.plots")
    main()
