#!/usr/bin/env bash
# Installs ser-edge as a service on Raspberry Pi OS (bookworm, trixie), on a Jetson (JetPack 6) or on any Debian or Ubuntu
# with Python 3.10 or later:
#
#     sudo deploy/install.sh model.onnx              # listen with this model from now on and after every start
#     sudo deploy/install.sh model.tflite            # the same with LiteRT instead of onnxruntime
#     sudo deploy/install.sh --uninstall
#
# Run it again to update ser-edge or to change the model. --prefix DIR installs below DIR and starts nothing (for images).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

prefix="" model="" uninstall=no
while [ $# -gt 0 ]; do
    case $1 in
    --prefix) prefix=${2:?"--prefix needs a folder"} && shift ;;
    --uninstall) uninstall=yes ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit ;;
    -*) fail "unknown option $1; valid: --prefix DIR, --uninstall" ;;
    *) model=$1 ;;
    esac
    shift
done
[ -n "$prefix" ] || [ "$(id -u)" -eq 0 ] || fail "needs root; run: sudo $0 $*"

program=$prefix/opt/ser-edge
settings=$prefix/etc/ser-edge
unit=$prefix/etc/systemd/system/ser-edge.service
systemctl() { [ -n "$prefix" ] || command systemctl "$@"; }

if [ "$uninstall" = yes ]; then
    [ ! -e "$unit" ] || systemctl disable --now ser-edge.service
    rm -rf "$program" "$unit"
    systemctl daemon-reload
    echo "ser-edge is removed; its settings are still in $settings, its state in $prefix/var/lib/ser-edge"
    exit
fi

[ -n "$model" ] || fail "which model? run: $0 model.onnx"
[ -f "$model" ] || fail "$model: no such model file; make one with: sertool export"
case $model in
*.onnx) extra=onnx ;;
*.tflite) extra=tflite ;;
*) fail "$model: unknown model format; valid: .onnx, .tflite" ;;
esac

if [ -z "$prefix" ]; then
    packages=(libportaudio2 python3-venv)
    dpkg-query --show "${packages[@]}" >/dev/null 2>&1 || {
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends "${packages[@]}"
    }
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "needs Python 3.10 or later"

mkdir -p "$program" "$settings" "$(dirname "$unit")"
[ -x "$program/bin/python" ] || python3 -m venv "$program"
"$program/bin/pip" install --quiet --upgrade "$here/../edge_runtime[$extra,mic,mqtt]"
cp "$here/../docs/device.md" "$program/device.md"

# Refused here, with one line, rather than by a service that starts again for ever.
"$program/bin/ser-edge" info "$model" >/dev/null
name=model.${model##*.}
rm -f "$settings"/model.*
install -m 644 "$model" "$settings/$name"
[ -e "$settings/ser-edge.conf" ] || install -m 600 "$here/ser-edge.conf" "$settings/ser-edge.conf"
[ -e "$settings/settings.toml" ] || install -m 644 "$here/settings.toml" "$settings/settings.toml"
sed -i "s|^MODEL=.*|MODEL=/etc/ser-edge/$name|" "$settings/ser-edge.conf"
install -m 644 "$here/ser-edge.service" "$unit"

systemctl daemon-reload
systemctl enable ser-edge.service
systemctl restart ser-edge.service
echo "ser-edge listens; see it with: journalctl -fu ser-edge, change $settings/ser-edge.conf, check with: $program/bin/ser-edge doctor"
