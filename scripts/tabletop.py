"""A small two-armed tabletop: coloured blocks, one of which the words name, and a hand that has to go there.

Two arms of ALOHA's 14 joints (waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate, gripper; left arm first)
stand behind a table. One hand already holds something, so its gripper is closed; the other one, open, is to reach the
named block while the holding arm retreats to its rest pose. Which hand is free shows in the joint state alone: neither
camera sees the arms. Lengths in metres, angles in radians, grippers from 0 (closed) to 1 (open).

The world: x to the right, y away from the robot, z up, the table at z = 0.
"""

from dataclasses import dataclass

import numpy as np

COLORS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 30)}
TABLE = (124, 104, 86)
CAMERAS = {
    "observation.images.cam_high": (56, 84),
    "observation.images.cam_left_wrist": (56, 56),
}  # key: (height, width)

CELL = 0.14  # places are the centres of a grid of square cells
PLACES = [(CELL * (column - 1), 0.17 + CELL * row) for row in range(2) for column in range(3)]
VIEW_CENTRE = (0.0, 0.17 + CELL / 2)  # of the camera above the table, which sees all six cells
JITTER = 0.015
BLOCK = 0.09
BLOCKS_SHOWN = 3
MAT = 25

BASES = ((-0.3, 0.0), (0.3, 0.0))  # left, right
SHOULDER_HEIGHT, LINK, HAND = 0.2, 0.36, 0.12  # both links are equally long; the hand points down
REST = ((-0.3, 0.2, 0.25), (0.3, 0.2, 0.25))  # where the holding hand retreats to
REACH_HEIGHT, REACHED_WITHIN = 0.04, 0.06
RATE = 0.25  # largest joint change in one step
FPS = 4
DIMS = 14
HOLDING, FREE = 0.1, 0.9  # grippers


def joints_for(hand: tuple[float, float, float], arm: int) -> np.ndarray:
    """Six joint angles [6] that put the tip of arm 0 (left) or 1 (right) at `hand`, elbow up, hand pointing down."""
    x, y, z = np.asarray(hand) - (*BASES[arm], SHOULDER_HEIGHT - HAND)
    waist, distance = np.arctan2(-x, y), np.hypot(x, y)
    span = np.hypot(distance, z)
    bend = np.arccos(np.clip(span / (2 * LINK), -1, 1))
    shoulder = np.arctan2(z, distance) + bend
    elbow = -2 * bend
    return np.array([waist, shoulder, elbow, 0.0, -np.pi / 2 - shoulder - elbow, -waist])


def hand_position(joints: np.ndarray, arm: int) -> np.ndarray:
    """Tip [3] of an arm with joint angles [>=5]; the inverse of `joints_for`."""
    waist, shoulder, elbow, _, wrist = joints[:5]
    pitches = np.cumsum([shoulder, elbow, wrist])
    lengths = np.array([LINK, LINK, HAND])
    distance, z = lengths @ np.cos(pitches), SHOULDER_HEIGHT + lengths @ np.sin(pitches)
    return np.array([*BASES[arm], 0.0]) + (-distance * np.sin(waist), distance * np.cos(waist), z)


@dataclass(frozen=True)
class Layout:
    """One start: blocks as {colour: (x, y, turn)}, the colour to reach, the free arm (0 or 1), joint state [14]."""

    blocks: dict[str, tuple[float, float, float]]
    target: str
    free_arm: int
    start: np.ndarray

    @property
    def instruction(self) -> str:
        return instruction(self.target)


def instruction(color: str) -> str:
    return f"reach the {color} block"


def sample_layout(rng: np.random.Generator) -> Layout:
    colors = [str(name) for name in rng.permutation(list(COLORS))[:BLOCKS_SHOWN]]
    places = rng.permutation(len(PLACES))[:BLOCKS_SHOWN]
    blocks = {
        color: (*(np.array(PLACES[place]) + rng.uniform(-JITTER, JITTER, 2)), rng.uniform(-0.3, 0.3))
        for color, place in zip(colors, places, strict=True)
    }
    free_arm = int(rng.integers(2))
    start = []
    for arm in range(2):
        hand = rng.uniform((-0.2, 0.12, REACH_HEIGHT), (0.2, 0.36, 0.2))
        gripper = (FREE if arm == free_arm else HOLDING) + rng.uniform(-0.1, 0.1)
        start += [*joints_for(hand, arm), gripper]
    return Layout(blocks, colors[0], free_arm, np.array(start, np.float32))


class Tabletop:
    """The simulator. `step` moves every joint towards its target, at most RATE at a time."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.state = layout.start.copy()
        self.top = render(layout, VIEW_CENTRE, CAMERAS["observation.images.cam_high"][1] / 28 * CELL, CAMERAS["observation.images.cam_high"])

    def step(self, action: np.ndarray) -> None:
        """`action` [14]: joint targets in the units of the state."""
        self.state += np.clip(np.asarray(action, np.float32) - self.state, -RATE, RATE)

    def hand(self, arm: int) -> np.ndarray:
        return hand_position(self.state[7 * arm : 7 * arm + 6], arm)

    def images(self) -> dict[str, np.ndarray]:
        """uint8 [height, width, 3] per camera: from above the table, and from the left hand down."""
        x, y, z = self.hand(0)
        wrist = render(self.layout, (x, y), 0.06 + max(z, 0.0), CAMERAS["observation.images.cam_left_wrist"])
        return {"observation.images.cam_high": self.top, "observation.images.cam_left_wrist": wrist}

    def observation(self) -> dict:
        return {"images": self.images(), "state": self.state.copy(), "instruction": self.layout.instruction}

    def reached(self) -> str | None:
        """The colour of the block at which the free hand is, if any."""
        x, y, z = self.hand(self.layout.free_arm)
        distance, color = min((np.hypot(x - bx, y - by), color) for color, (bx, by, _) in self.layout.blocks.items())
        return color if distance <= REACHED_WITHIN and z <= REACH_HEIGHT + REACHED_WITHIN else None


def expert_action(sim: Tabletop) -> np.ndarray:
    """Joint targets [14] one step ahead: each arm goes straight in joint space to its goal, all its joints arriving at
    once. What it does depends on the current state and layout alone."""
    layout = sim.layout
    action = sim.state.copy()
    for arm in range(2):
        goal = (*layout.blocks[layout.target][:2], REACH_HEIGHT) if arm == layout.free_arm else REST[arm]
        part = slice(7 * arm, 7 * arm + 6)
        way = joints_for(goal, arm) - sim.state[part]
        action[part] += way * min(1.0, RATE / max(np.abs(way).max(), 1e-9))
        action[7 * arm + 6] = FREE if arm == layout.free_arm else HOLDING
    return action


def render(layout: Layout, centre: tuple[float, float], width_m: float, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3] view straight down on a stretch of table `width_m` wide around `centre`, y upwards."""
    height, width = size
    fine = 2  # samples per pixel and side
    pixel = width_m / (width * fine)
    xs = centre[0] + (np.arange(width * fine) + 0.5 - width * fine / 2) * pixel
    ys = centre[1] - (np.arange(height * fine) + 0.5 - height * fine / 2) * pixel
    right, far = ((xs - VIEW_CENTRE[0]) / CELL)[None], ((ys - VIEW_CENTRE[1]) / CELL)[:, None]
    grain = 6 * np.sin(40 * ys[:, None] + 3 * np.sin(9 * xs[None]))  # wood
    image = np.array(TABLE) + (grain + MAT * right)[..., None] + MAT * far[..., None] * np.array([1, 0, -1])
    for color, (bx, by, turn) in layout.blocks.items():
        dx, dy = xs[None] - bx, ys[:, None] - by
        along, across = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        distance = np.maximum(np.abs(along), np.abs(across))
        image[distance < BLOCK / 2] = 0.75 * np.array(COLORS[color])  # its edge
        image[distance < BLOCK / 2 - 0.006] = COLORS[color]
    image = image.reshape(height, fine, width, fine, 3).mean(axis=(1, 3))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def demonstrate(layout: Layout, settle: int = 1) -> tuple[list[dict], list[np.ndarray]]:
    """Observations and actions of the expert, until the free hand has been at its goal for `settle` steps."""
    sim, observations, actions = Tabletop(layout), [], []
    while settle >= 0:
        observations.append(sim.observation())
        actions.append(expert_action(sim))
        sim.step(actions[-1])
        settle -= bool(np.abs(expert_action(sim) - sim.state).max() < 1e-3)
    return observations, actions
