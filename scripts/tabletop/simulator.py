"""Simulate a small two-armed tabletop task: reach the coloured block that the instruction names.

Two arms with ALOHA's 14 joints (waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate, gripper; left arm
first) stand behind a table. One hand holds something and waits at its rest pose, gripper closed; the other one, open
and anywhere over the table, has to reach the named block. Only the joint state shows which hand is free: the cameras
see neither arms nor grippers. So the image shows where the blocks are, the instruction names one, and the state gives
the free hand and its start. Lengths are in metres, angles in radians, grippers from 0 (closed) to 1 (open).

World frame: x to the right, y away from the robot, z up, the table at z = 0.
"""

from dataclasses import dataclass

import numpy as np

DIMS = 14  # of state and action
FPS = 4
COLORS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
OVERHEAD, WRIST = "observation.images.cam_high", "observation.images.cam_left_wrist"
# (height, width) in pixels, multiples of a token's 28 pixels and large enough not to be upscaled.
CAMERAS = {OVERHEAD: (56, 84), WRIST: (56, 56)}

CELL = 0.2  # side length of the table area that one token of the overhead view covers
PLACES = [(-CELL, 0.24), (0.0, 0.24), (CELL, 0.24)]  # centres of the near row of tokens
VIEW_CENTRE, VIEW_WIDTH = (0.0, 0.34), 3 * CELL  # of the overhead camera
BLOCK, JITTER = 0.12, 0.015
UNNAMED = "unnamed"  # placeholder for the colour in an instruction that names none
TABLE = (124, 104, 86)

BASES = ((-0.3, 0.0), (0.3, 0.0))  # left, right
SHOULDER_HEIGHT, LINK, HAND = 0.2, 0.36, 0.12  # both links have the same length; the hand points down
REST = ((-0.3, 0.2, 0.25), (0.3, 0.2, 0.25))  # rest position of the holding hand, +-2 cm
# Start region of the free hand, wide enough that its position on the way reveals little about its goal.
HOME, HOME_SPREAD = ((-0.1, 0.2, 0.2), (0.1, 0.2, 0.2)), (0.25, 0.1, 0.1)
REACH_HEIGHT = 0.04  # height of a hand that has reached its block
TOLERANCE = 0.06
RATE = 0.25  # maximum joint change per step
HOLDING, FREE = 0.1, 0.9  # gripper openings


def joints_for(hand: tuple[float, float, float], arm: int) -> np.ndarray:
    """Compute the joint angles [6] that put the tip of arm 0 (left) or 1 (right) at `hand`, elbow up, hand down."""
    x, y, z = np.asarray(hand) - (*BASES[arm], SHOULDER_HEIGHT - HAND)
    waist, distance = np.arctan2(-x, y), np.hypot(x, y)
    bend = np.arccos(np.clip(np.hypot(distance, z) / (2 * LINK), -1, 1))
    shoulder, elbow = np.arctan2(z, distance) + bend, -2 * bend
    return np.array([waist, shoulder, elbow, 0.0, -np.pi / 2 - shoulder - elbow, -waist])


def hand_position(joints: np.ndarray, arm: int) -> np.ndarray:
    """Compute the tip position [3] of an arm from its joint angles [6]; the inverse of `joints_for`."""
    waist, *pitches = joints[[0, 1, 2, 4]]
    pitches, lengths = np.cumsum(pitches), np.array([LINK, LINK, HAND])
    distance, z = lengths @ np.cos(pitches), SHOULDER_HEIGHT + lengths @ np.sin(pitches)
    return np.array([*BASES[arm], 0.0]) + (-distance * np.sin(waist), distance * np.cos(waist), z)


@dataclass(frozen=True)
class Layout:
    """Initial state of an episode.

    Attributes:
        blocks: {colour: (x, y, turn)}.
        target: the colour to reach.
        free_arm: 0 (left) or 1 (right).
        start: joint state [14].
    """

    blocks: dict[str, tuple[float, float, float]]
    target: str
    free_arm: int
    start: np.ndarray


def instruction(color: str) -> str:
    return f"reach the {color} block"


def sample_layout(rng: np.random.Generator) -> Layout:
    """Sample a layout with one block of each colour, each in a different place.

    The start of the hands is independent of blocks and instruction, so that only the image and the instruction reveal
    the goal.
    """
    colors = [str(name) for name in rng.permutation(list(COLORS))]
    places = rng.permutation(PLACES) + rng.uniform(-JITTER, JITTER, (len(colors), 2))
    blocks = {color: (x, y, rng.uniform(-0.3, 0.3)) for color, (x, y) in zip(colors, places, strict=True)}
    free_arm, start = int(rng.integers(2)), []
    for arm in range(2):
        free = arm == free_arm
        centre, spread, gripper = (HOME[arm], HOME_SPREAD, FREE) if free else (REST[arm], 0.02, HOLDING)
        hand = centre + rng.uniform(-1, 1, 3) * spread
        start += [*joints_for(hand, arm), gripper + rng.uniform(-0.1, 0.1)]
    return Layout(blocks, colors[0], free_arm, np.array(start, np.float32))


class Tabletop:
    """Simulator of one layout, starting in its initial state."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.state = layout.start.copy()
        self._overhead = render(layout, VIEW_CENTRE, VIEW_WIDTH, CAMERAS[OVERHEAD])

    def step(self, action: np.ndarray) -> None:
        """Move every joint towards its target in `action` [14], by at most RATE."""
        self.state += np.clip(np.asarray(action, np.float32) - self.state, -RATE, RATE)

    def hand(self, arm: int) -> np.ndarray:
        """Return the tip position [3] of an arm."""
        return hand_position(self.state[7 * arm : 7 * arm + 6], arm)

    def observation(self) -> dict:
        """Return a policy's observation: uint8 images by camera, state [14], instruction."""
        x, y, z = self.hand(0)
        wrist = render(self.layout, (x, y), 0.06 + max(z, 0.0), CAMERAS[WRIST])
        return {
            "images": {OVERHEAD: self._overhead, WRIST: wrist},
            "state": self.state.copy(),
            "instruction": instruction(self.layout.target),
        }

    def reached(self) -> str | None:
        """Return the colour of the block that the free hand has reached, if any."""
        x, y, z = self.hand(self.layout.free_arm)
        distance, color = min((np.hypot(x - bx, y - by), color) for color, (bx, by, _) in self.layout.blocks.items())
        return color if distance <= TOLERANCE and z <= REACH_HEIGHT + TOLERANCE else None


def expert_action(sim: Tabletop) -> np.ndarray:
    """Compute joint targets [14] one step ahead.

    Each arm moves straight to its goal in joint space, so that all its joints arrive at the same time. The action is a
    function of the current state only, so that a policy needs no memory.
    """
    layout, action = sim.layout, sim.state.copy()
    for arm in range(2):
        free, joints = arm == layout.free_arm, slice(7 * arm, 7 * arm + 6)
        goal = (*layout.blocks[layout.target][:2], REACH_HEIGHT) if free else REST[arm]
        way = joints_for(goal, arm) - sim.state[joints]
        action[joints] += way * min(1.0, RATE / max(np.abs(way).max(), 1e-9))
        action[7 * arm + 6] = FREE if free else HOLDING
    return action


def demonstrate(layout: Layout) -> tuple[list[dict], list[np.ndarray]]:
    """Run the expert until nothing moves any more; return its observations and actions [14]."""
    sim, observations, actions = Tabletop(layout), [], []
    while not actions or np.abs(actions[-1] - observations[-1]["state"]).max() > 1e-3:
        observations.append(sim.observation())
        actions.append(expert_action(sim))
        sim.step(actions[-1])
    return observations, actions


def render(layout: Layout, centre: tuple[float, float], width_m: float, size: tuple[int, int]) -> np.ndarray:
    """Render the view straight down on a `width_m` wide area of the table around `centre`, y upwards: uint8 [*size, 3].

    Brightness changes from left to right and colour with the distance, so that every patch reveals its position.
    """
    fine = 2  # samples per pixel and axis
    height, width = (fine * side for side in size)
    steps = [(np.arange(n, dtype=np.float32) + 0.5 - n / 2) * (width_m / width) for n in (width, height)]
    x, y = centre[0] + steps[0][None], centre[1] - steps[1][:, None]
    right, far = (x - VIEW_CENTRE[0]) / CELL, (y - VIEW_CENTRE[1]) / CELL
    shade = 40 * right + 6 * np.sin(40 * y + 3 * np.sin(9 * x))  # the second term is the wood grain
    image = np.array(TABLE, np.float32) + shade[..., None] + 25 * far[..., None] * np.array([1, 0, -1], np.float32)
    for color, (bx, by, turn) in layout.blocks.items():
        along = np.cos(turn) * (x - bx) + np.sin(turn) * (y - by)
        across = np.cos(turn) * (y - by) - np.sin(turn) * (x - bx)
        distance = np.maximum(np.abs(along), np.abs(across))
        image[distance < BLOCK / 2] = 0.75 * np.array(COLORS[color])  # its edge
        image[distance < 0.4 * BLOCK] = COLORS[color]
    image = image.reshape(size[0], fine, size[1], fine, 3).mean(axis=(1, 3))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def to_pixels(points: np.ndarray) -> np.ndarray:
    """Map world (x, y) [..., 2] to (column, row) in the overhead view, float [..., 2]."""
    height, width = CAMERAS[OVERHEAD]
    scale = width / VIEW_WIDTH
    return (np.asarray(points)[..., :2] - VIEW_CENTRE) * (scale, -scale) + (width / 2 - 0.5, height / 2 - 0.5)
