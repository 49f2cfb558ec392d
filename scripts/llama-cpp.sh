#!/usr/bin/env bash
# Builds llama.cpp's measuring programs from the source package of llama-cpp-python on PyPI, ten minutes on two
# processors, and prints the folder that they are in. What is built already stays.
set -euo pipefail
version=0.3.36
root="$(cd "$(dirname "$0")/.." && pwd)"
folder="$("$root/scripts/target-dir")/llama-cpp-$version"
programs="llama-bench llama-batched-bench llama-quantize ggml-rpc-server"
built="$folder/build/bin"

missing=0
for program in $programs; do
    [ -x "$built/$program" ] || missing=1
done
if [ "$missing" = 1 ]; then
    mkdir -p "$folder"
    {
        python3 -m venv "$folder/python"
        "$folder/python/bin/pip" install --quiet cmake==4.1.2 ninja==1.13.0
        cd "$folder"
        if [ ! -d source ]; then
            # pip asks the index that this machine is set to use, and looks into the package for its name.
            "$folder/python/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python \
                --dest package --require-hashes --requirement "$root/scripts/llama-cpp.txt"
            rm -rf unpacked
            mkdir unpacked
            tar --extract --gzip --file package/*.tar.gz --directory unpacked --strip-components 1
            mv unpacked source
            rm -r package
        fi
        PATH="$folder/python/bin:$PATH" cmake -S source/vendor/llama.cpp -B build -G Ninja \
            -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
            -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
        # shellcheck disable=SC2086 # the names are words
        PATH="$folder/python/bin:$PATH" cmake --build build --target $programs
    } >&2
fi
echo "$built"
