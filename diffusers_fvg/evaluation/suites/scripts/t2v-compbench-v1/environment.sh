# Creates the environments of T2V-CompBench V1 (branch main) and copies its scripts into the repositories whose models they use,
# as its README describes. Needs conda, CUDA and CUDA_HOME.

[ -d "$CHECKOUT" ] || git clone https://github.com/KaiyueSun98/T2V-CompBench "$CHECKOUT"
cd "$CHECKOUT"
clone() { [ -d "$2" ] || git clone --recurse-submodules "$1" "$2"; }
clone https://github.com/haotian-liu/LLaVA LLaVA
clone https://github.com/LiheYoung/Depth-Anything Depth-Anything
clone https://github.com/IDEA-Research/Grounded-Segment-Anything Grounded-Segment-Anything
clone https://github.com/16lemoing/dot dot
cp MLLM_eval/*.py LLaVA/llava/eval/
cp Detection_eval/run_depth.py Depth-Anything/
# The name of this file has its extension twice.
cp Detection_eval/eval_spatial_relationships.py.py Grounded-Segment-Anything/eval_spatial_relationships.py
cp Detection_eval/eval_numeracy.py Grounded-Segment-Anything/GroundingDINO/demo/
cp Tracking_eval/motion_binding_seg.py Grounded-Segment-Anything/
cp Tracking_eval/eval_motion_binding_*.py Tracking_eval/motion_binding_score_cal.py dot/
cp Tracking_eval/demo_options.py dot/dot/utils/options/demo_options.py

"$CONDA" create --yes --prefix "$ENVIRONMENTS/llava" python=3.10
"$ENVIRONMENTS/llava/bin/python" -m pip install -e ./LLaVA
export AM_I_DOCKER=False BUILD_WITH_CUDA=True
"$CONDA" create --yes --prefix "$ENVIRONMENTS/compbench" python=3.10
python="$ENVIRONMENTS/compbench/bin/python"
"$python" -m pip install -e ./Grounded-Segment-Anything/segment_anything
"$python" -m pip install --no-build-isolation -e ./Grounded-Segment-Anything/GroundingDINO
"$python" -m pip install -r Grounded-Segment-Anything/requirements.txt -r Depth-Anything/requirements.txt -r dot/requirements.txt
fetch Grounded-Segment-Anything/groundingdino_swint_ogc.pth \
  https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha/groundingdino_swint_ogc.pth
fetch Grounded-Segment-Anything/sam_vit_h_4b8939.pth \
  https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth
for name in cvo_raft_patch_8 movi_f_raft_patch_4_alpha movi_f_cotracker2_patch_4_wind_8; do
  fetch "dot/checkpoints/$name.pth" "https://huggingface.co/16lemoing/dot/resolve/main/$name.pth"
done

# The scripts parse `--total_frame` and `--fps` as strings but divide by them.
sed -i -E '/"--(total_frame|fps)"/s/type=str/type=int/' Grounded-Segment-Anything/motion_binding_seg.py
