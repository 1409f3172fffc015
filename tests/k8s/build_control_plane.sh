#!/usr/bin/env bash
# build_control_plane.sh FOLDER: etcd, kube-apiserver, kube-controller-manager and kube-scheduler 1.20.2 in FOLDER, from
# Debian 12's packages: etcd as it is, the others compiled from the source package, which holds all they need. Needs
# root and apt, 4 GB of disk meanwhile, and 4 to 9 minutes on two cores. Does nothing when they are there.
set -euo pipefail

folder=${1:?folder for the programs}
source_version=1.20.5+really1.20.2-1.1+deb12u1
programs="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler"

if [ -x "$folder/kube-apiserver" ]; then
  exit
fi
for needed in apt-get dpkg-deb; do
  command -v "$needed" >/dev/null || { echo "building a control plane needs Debian's $needed" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "building a control plane needs root, to install Debian's Go" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

apt-get -q -y install --no-install-recommends \
  dpkg-dev golang-1.19-go golang-github-modern-go-reflect2-dev rsync jq make patch >/dev/null
apt-get -q download etcd-server >/dev/null
dpkg-deb --extract etcd-server_*.deb etcd

# Lists of source packages beside the machine's own, which stay as they are.
eval "$(apt-config shell sources Dir::Etc::sourceparts/d)"
mkdir -p sources lists/partial
sed 's/^Types: deb$/Types: deb-src/' "$sources"/debian.sources >sources/debian.sources
options=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources" -o "Dir::State::Lists=$work/lists")
apt-get -q "${options[@]}" update >/dev/null
apt-get -q "${options[@]}" source "kubernetes=$source_version" >/dev/null
cd "kubernetes-${source_version%-*}"

# The vendored reflect2 1.0.1 crashes on the first custom resource when compiled by Go 1.18 or newer.
reflect2=vendor/github.com/modern-go/reflect2
rm -f $reflect2/*.go $reflect2/*.s
dpkg -L golang-github-modern-go-reflect2-dev | grep -E '/reflect2/[^/]+\.(go|s)$' | xargs cp -t $reflect2

PATH="$(dpkg -L golang-1.19-go | grep -E '/go-1.19/bin$'):$PATH"
export PATH CGO_ENABLED=0 GOPROXY=off GOPATH="$PWD/.go" GOCACHE="$work/cache"
export KUBE_GIT_TREE_STATE=clean KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_COMMIT=debian
export SOURCE_DATE_EPOCH=1610000000
mkdir -p .go/src/k8s.io
ln -sfn ../../.. .go/src/k8s.io/kubernetes
make WHAT="$programs" >build.log 2>&1 || { tail -30 build.log >&2; exit 1; }

# kube-apiserver last: where it is, the others are.
mkdir -p "$folder"
cp "$work/etcd/usr/bin/etcd" "$folder/"
for program in kube-scheduler kube-controller-manager kube-apiserver; do
  cp -L "_output/bin/$program" "$folder/.$program"
  mv "$folder/.$program" "$folder/$program"
done
echo "control plane: $folder"
