"""List the cameras and the state and action features of known datasets and robots."""

_ALOHA_CAMERAS = {
    "face_view": "observation.images.cam_high",
    "left_wrist_view": "observation.images.cam_left_wrist",
    "right_wrist_view": "observation.images.cam_right_wrist",
}
_X2_CAMERAS = {
    "face_view": "observation.images.faceImg",
    "left_wrist_view": "observation.images.leftImg",
    "right_wrist_view": "observation.images.rightImg",
}
_ROBOCHALLENGE_CAMERAS = {
    "face_view": "cam_high_rgb",
    "left_wrist_view": "cam_wrist_left_rgb",
    "right_wrist_view": "cam_wrist_right_rgb",
}
# Upstream's KEY_MAPPINGS: repo_id -> ({view: camera key} in prompt order, state key, action key).
KEY_MAPPINGS: dict[str, tuple[dict[str, str], str, str]] = {
    "lerobot/aloha_mobile_cabinet": (_ALOHA_CAMERAS, "observation.state", "action"),
    "physical-intelligence/libero": ({"face_view": "image", "left_wrist_view": "wrist_image"}, "state", "actions"),
    "x2": (_X2_CAMERAS, "observation.state", "action"),
    "x2_normal": (_X2_CAMERAS, "observation.state", "action"),
    "libero": ({"face_view": "faceImg", "right_wrist_view": "rightImg"}, "observation.state", "action"),
    "robochallenge_aloha": (_ROBOCHALLENGE_CAMERAS, "observation.state", "action"),
}

# The 14 dimensions of lerobot/aloha_mobile_cabinet's state and action, in dataset order: the left arm, then the right.
# (Upstream's example lists 13; it lacks the left waist.)
_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ALOHA_DOF = {f"{side}_{joint}": 1 for side in ("left", "right") for joint in _JOINTS}
