"""A small two-armed tabletop: coloured blocks, one of which the words name, and a hand that has to go there.

Two arms of ALOHA's 14 joints (waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate, gripper; left arm first)
stand behind a table. One hand holds something and waits at its rest pose, gripper closed; the other one, open and
anywhere over the table, is to reach the named block. Which hand is free shows in the joint state alone: the cameras see
neither arms nor grippers. So the picture tells where the blocks are, the words which one, the state which hand and from
where. Lengths in metres, angles in radians, grippers from 0 (closed) to 1 (open).

The world: x to the right, y away from the robot, z up, the table at z = 0.
"""

from dataclasses import dataclass

import numpy as np

DIMS = 14  # of state and action
FPS = 4
COLORS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
OVERHEAD, WRIST = "observation.images.cam_high", "observation.images.cam_left_wrist"
# (height, width) in pixels, in multiples of the 28 pixels of a token, and large enough not to be scaled up.
CAMERAS = {OVERHEAD: (56, 84), WRIST: (56, 56)}

CELL = 0.2  # side of the square of table that one token of the overhead view shows
PLACES = [(-CELL, 0.24), (0.0, 0.24), (CELL, 0.24)]  # in the middle of the near row of tokens
VIEW_CENTRE, VIEW_WIDTH = (0.0, 0.34), 3 * CELL  # of the overhead camera
BLOCK, JITTER = 0.12, 0.015
UNNAMED = "unnamed"  # in the place of a colour: names none
TABLE = (124, 104, 86)

BASES = ((-0.3, 0.0), (0.3, 0.0))  # left, right
SHOULDER_HEIGHT, LINK, HAND = 0.2, 0.36, 0.12  # both links are equally long; the hand points down
REST = ((-0.3, 0.2, 0.25), (0.3, 0.2, 0.25))  # where the holding hand waits, within 2 cm
# Where the free hand may start: wide enough that its place on the way says little about where it is going.
HOME, HOME_SPREAD = ((-0.1, 0.2, 0.2), (0.1, 0.2, 0.2)), (0.25, 0.1, 0.1)
REACH_HEIGHT = 0.04  # of a hand that has reached its block
TOLERANCE = 0.06
RATE = 0.25  # largest joint change in one step
HOLDING, FREE = 0.1, 0.9  # grippers


def joints_for(hand: tuple[float, float, float], arm: int) -> np.ndarray:
    """Six joint angles [6] that put the tip of arm 0 (left) or 1 (right) at `hand`, elbow up, hand pointing down."""
    x, y, z = np.asarray(hand) - (*BASES[arm], SHOULDER_HEIGHT - HAND)
    waist, distance = np.arctan2(-x, y), np.hypot(x, y)
    bend = np.arccos(np.clip(np.hypot(distance, z) / (2 * LINK), -1, 1))
    shoulder, elbow = np.arctan2(z, distance) + bend, -2 * bend
    return np.array([waist, shoulder, elbow, 0.0, -np.pi / 2 - shoulder - elbow, -waist])


def hand_position(joints: np.ndarray, arm: int) -> np.ndarray:
    """Tip [3] of an arm with joint angles [6]; the inverse of `joints_for`."""
    waist, *pitches = joints[[0, 1, 2, 4]]
    pitches, lengths = np.cumsum(pitches), np.array([LINK, LINK, HAND])
    distance, z = lengths @ np.cos(pitches), SHOULDER_HEIGHT + lengths @ np.sin(pitches)
    return np.array([*BASES[arm], 0.0]) + (-distance * np.sin(waist), distance * np.cos(waist), z)


@dataclass(frozen=True)
class Layout:
    """One start: blocks as {colour: (x, y, turn)}, the colour to reach, the free arm (0 or 1), joint state [14]."""

    blocks: dict[str, tuple[float, float, float]]
    target: str
    free_arm: int
    start: np.ndarray


def instruction(color: str) -> str:
    return f"reach the {color} block"


def sample_layout(rng: np.random.Generator) -> Layout:
    """A block of each colour, each on a place of its own. The hands start where they do whatever the blocks and the
    words are, so that nothing but picture and words tells where to go."""
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
    """The simulator of one layout, from its start on."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.state = layout.start.copy()
        self._overhead = render(layout, VIEW_CENTRE, VIEW_WIDTH, CAMERAS[OVERHEAD])

    def step(self, action: np.ndarray) -> None:
        """Moves every joint towards its target in `action` [14], at most RATE."""
        self.state += np.clip(np.asarray(action, np.float32) - self.state, -RATE, RATE)

    def hand(self, arm: int) -> np.ndarray:
        """Tip [3] of an arm."""
        return hand_position(self.state[7 * arm : 7 * arm + 6], arm)

    def observation(self) -> dict:
        """What a policy gets: uint8 images by camera, state [14], instruction."""
        x, y, z = self.hand(0)
        wrist = render(self.layout, (x, y), 0.06 + max(z, 0.0), CAMERAS[WRIST])
        return {
            "images": {OVERHEAD: self._overhead, WRIST: wrist},
            "state": self.state.copy(),
            "instruction": instruction(self.layout.target),
        }

    def reached(self) -> str | None:
        """The colour of the block at which the free hand is, if any."""
        x, y, z = self.hand(self.layout.free_arm)
        distance, color = min((np.hypot(x - bx, y - by), color) for color, (bx, by, _) in self.layout.blocks.items())
        return color if distance <= TOLERANCE and z <= REACH_HEIGHT + TOLERANCE else None


def expert_action(sim: Tabletop) -> np.ndarray:
    """Joint targets [14] one step ahead: each arm goes straight in joint space to its goal, all its joints arriving at
    once. A function of the present alone, so that there is nothing to remember."""
    layout, action = sim.layout, sim.state.copy()
    for arm in range(2):
        free, joints = arm == layout.free_arm, slice(7 * arm, 7 * arm + 6)
        goal = (*layout.blocks[layout.target][:2], REACH_HEIGHT) if free else REST[arm]
        way = joints_for(goal, arm) - sim.state[joints]
        action[joints] += way * min(1.0, RATE / max(np.abs(way).max(), 1e-9))
        action[7 * arm + 6] = FREE if free else HOLDING
    return action


def demonstrate(layout: Layout) -> tuple[list[dict], list[np.ndarray]]:
    """The expert's observations and actions [14], until a step in which nothing moves any more."""
    sim, observations, actions = Tabletop(layout), [], []
    while not actions or np.abs(actions[-1] - observations[-1]["state"]).max() > 1e-3:
        observations.append(sim.observation())
        actions.append(expert_action(sim))
        sim.step(actions[-1])
    return observations, actions


def render(layout: Layout, centre: tuple[float, float], width_m: float, size: tuple[int, int]) -> np.ndarray:
    """uint8 [*size, 3]: the view straight down on a stretch of table `width_m` wide around `centre`, y upwards.

    The light falls from one side and its colour changes with the distance, so that every patch tells where it is.
    """
    fine = 2  # samples per pixel and side
    height, width = (fine * side for side in size)
    steps = [(np.arange(n, dtype=np.float32) + 0.5 - n / 2) * (width_m / width) for n in (width, height)]
    x, y = centre[0] + steps[0][None], centre[1] - steps[1][:, None]
    right, far = (x - VIEW_CENTRE[0]) / CELL, (y - VIEW_CENTRE[1]) / CELL
    shade = 40 * right + 6 * np.sin(40 * y + 3 * np.sin(9 * x))  # the second term is the grain of the wood
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
    """World (x, y) [..., 2] -> (column, row) in the overhead view [..., 2], float."""
    height, width = CAMERAS[OVERHEAD]
    scale = width / VIEW_WIDTH
    return (np.asarray(points)[..., :2] - VIEW_CENTRE) * (scale, -scale) + (width / 2 - 0.5, height / 2 - 0.5)
