# Creates the environment of VBench-2.0 as its README describes. Needs conda, CUDA 11.8, gcc 11 and ffmpeg 4.

[ -d "$CHECKOUT" ] || git clone https://github.com/Vchitect/VBench "$CHECKOUT"
cd "$CHECKOUT/VBench-2.0"
"$CONDA" create --yes --prefix "$ENVIRONMENTS/vbench2" python=3.10
python="$ENVIRONMENTS/vbench2/bin/python"
"$python" -m pip install psutil ninja
"$python" -m pip install torch==2.5.1 torchvision==0.20.1 torchaudio==2.5.1 --index-url https://download.pytorch.org/whl/cu118
"$python" -m pip install git+https://github.com/Dao-AILab/flash-attention.git@v2.7.2.post1
"$python" -m pip install -r requirement.txt
"$python" -m pip install retinaface_pytorch==0.0.8 --no-deps
(cd vbench2/third_party/Instance_detector && "$python" -m pip install -e .)
"$python" -m pip install mmcv==2.2.0 -f https://download.openmmlab.com/mmcv/dist/cu118/torch2.4/index.html --no-cache-dir
# Both packages refuse an mmcv above 2.1.0; the README makes this change.
for package in mmdet mmyolo; do
  sed -i "s/^mmcv_maximum_version = .*/mmcv_maximum_version = '2.3.0'/" \
    "$ENVIRONMENTS/vbench2/lib/python3.10/site-packages/$package/__init__.py"
done
