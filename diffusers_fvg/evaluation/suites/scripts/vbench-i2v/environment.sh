# Creates the environment of VBench-I2V as VBench's README describes. Needs conda and CUDA 11.8.

[ -d "$CHECKOUT" ] || git clone https://github.com/Vchitect/VBench "$CHECKOUT"
cd "$CHECKOUT"
"$CONDA" create --yes --prefix "$ENVIRONMENTS/vbench" python=3.10
python="$ENVIRONMENTS/vbench/bin/python"
"$python" -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cu118
"$python" -m pip install vbench gdown
"$python" -m pip install --no-build-isolation detectron2@git+https://github.com/facebookresearch/detectron2.git
# The images that the videos start from.
[ -d vbench2_beta_i2v/data/crop ] || PATH="$ENVIRONMENTS/vbench/bin:$PATH" bash vbench2_beta_i2v/download_data.sh
