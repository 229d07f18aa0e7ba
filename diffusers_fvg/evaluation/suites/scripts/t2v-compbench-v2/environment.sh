# Creates the environments of T2V-CompBench V2 as the README of branch V2 describes, and corrects three of its scripts. Needs conda, CUDA and CUDA_HOME.

[ -d "$CHECKOUT" ] || git clone --branch V2 https://github.com/KaiyueSun98/T2V-CompBench "$CHECKOUT"
cd "$CHECKOUT"

# Judges of attributes, actions and interactions: LLaVA-1.6-34B.
"$CONDA" create --yes --prefix "$ENVIRONMENTS/llava" python=3.10.15
python="$ENVIRONMENTS/llava/bin/python"
"$python" -m pip install --upgrade pip
"$python" -m pip install -e ./LLaVA
"$python" -m pip install -e "./LLaVA[train]"
"$python" -m pip install flash-attn --no-build-isolation --no-cache-dir

# Detection and tracking: GroundingDINO, SAM, Depth Anything, DOT.
export AM_I_DOCKER=False BUILD_WITH_CUDA=True
"$CONDA" create --yes --prefix "$ENVIRONMENTS/compbench" python=3.12.3
python="$ENVIRONMENTS/compbench/bin/python"
"$python" -m pip install -e ./Grounded-Segment-Anything/segment_anything
"$python" -m pip install -r Grounded-Segment-Anything/requirements.txt
fetch Grounded-Segment-Anything/GroundingDINO/weights/groundingdino_swint_ogc.pth \
  https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha/groundingdino_swint_ogc.pth
# The scripts open this file; the README names another.
fetch Grounded-Segment-Anything/sam_vit_h_4b8939.pth \
  https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth
for name in cvo_raft_patch_8 movi_f_raft_patch_4_alpha movi_f_cotracker2_patch_4_wind_8; do
  fetch "dot/checkpoints/$name.pth" "https://huggingface.co/16lemoing/dot/resolve/main/$name.pth"
done

# The scripts parse `--total_frame` and `--fps` as strings but divide by them; an argument has `elp` for `help`.
sed -i -E '/"--(total_frame|fps)"/s/type=str/type=int/' Grounded-Segment-Anything/compbench_motion_binding_seg.py
sed -i 's/,elp="/,help="/' LLaVA/llava/eval/compbench_eval_dynamic_attr.py
