"""Facts about MPII Human Pose: joints in the order of its files, pairs, limbs, groups."""

from configs.skeleton import Skeleton

R_ANKLE, R_KNEE, R_HIP, L_HIP, L_KNEE, L_ANKLE = 0, 1, 2, 3, 4, 5
PELVIS, THORAX, UPPER_NECK, HEAD_TOP = 6, 7, 8, 9
R_WRIST, R_ELBOW, R_SHOULDER, L_SHOULDER, L_ELBOW, L_WRIST = 10, 11, 12, 13, 14, 15

MPII = Skeleton(
    name="mpii",
    names=(
        "r_ankle", "r_knee", "r_hip", "l_hip", "l_knee", "l_ankle", "pelvis", "thorax",
        "upper_neck", "head_top", "r_wrist", "r_elbow", "r_shoulder", "l_shoulder", "l_elbow",
        "l_wrist",
    ),
    flip_pairs=(
        (R_ANKLE, L_ANKLE), (R_KNEE, L_KNEE), (R_HIP, L_HIP),
        (R_WRIST, L_WRIST), (R_ELBOW, L_ELBOW), (R_SHOULDER, L_SHOULDER),
    ),
    limbs=(
        (R_ANKLE, R_KNEE), (R_KNEE, R_HIP), (R_HIP, PELVIS), (PELVIS, L_HIP), (L_HIP, L_KNEE),
        (L_KNEE, L_ANKLE), (PELVIS, THORAX), (THORAX, UPPER_NECK), (UPPER_NECK, HEAD_TOP),
        (R_WRIST, R_ELBOW), (R_ELBOW, R_SHOULDER), (R_SHOULDER, THORAX), (THORAX, L_SHOULDER),
        (L_SHOULDER, L_ELBOW), (L_ELBOW, L_WRIST),
    ),
    groups=(
        ("head", (HEAD_TOP,)),
        ("neck", (UPPER_NECK,)),
        ("shoulder", (R_SHOULDER, L_SHOULDER)),
        ("elbow", (R_ELBOW, L_ELBOW)),
        ("wrist", (R_WRIST, L_WRIST)),
        ("hip", (R_HIP, L_HIP)),
        ("knee", (R_KNEE, L_KNEE)),
        ("ankle", (R_ANKLE, L_ANKLE)),
    ),
)  # fmt: skip

# Raw annotations (mpii_annotations.json) give the scale of the body and its middle. The h5 files of
# princeton-vl hold both enlarged so that the box takes in the whole person.
# See docs/conventions.md.
BOX_SCALE = 1.25
BOX_SHIFT_Y_PX = 15.0
PIXELS_PER_SCALE = 200.0
HEAD_LENGTH_FROM_NECK_TO_TOP = 0.75
