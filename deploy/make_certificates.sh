#!/usr/bin/env bash
# Make what TLS needs: a certificate authority of your own, and a certificate for the server under each ADDRESS by
# which clients call it. Writes ca.pem, ca.key, server.pem and server.key to the folder certificates/; an authority
# that is there already is kept, so that the clients' ca.pem stays good.
#     deploy/make_certificates.sh 192.168.1.10 laptop.local
set -eu
if [ $# -eq 0 ]; then
    echo "usage: $0 ADDRESS..." >&2
    exit 2
fi
names=
for address in "$@"; do
    case $address in
    *[!0-9.]*) kind=DNS ;;
    *) kind=IP ;;
    esac
    case $address in *:*) kind=IP ;; esac
    names=${names:+$names,}$kind:$address
done
umask 077
mkdir -p "$(dirname "$0")/../certificates"
cd "$(dirname "$0")/../certificates"
log=$(mktemp)
trap 'rm -f "$log" server.csr server.ext' EXIT
quietly() {
    "$@" 2>"$log" || { cat "$log" >&2; exit 1; }
}
[ -f ca.key ] || quietly openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj "/CN=FL-IoT certificate authority" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.pem
quietly openssl req -newkey rsa:3072 -nodes -subj "/CN=FL-IoT server" -keyout server.key -out server.csr
cat >server.ext <<EOF
subjectAltName=$names
basicConstraints=CA:FALSE
keyUsage=digitalSignature,keyEncipherment
extendedKeyUsage=serverAuth
authorityKeyIdentifier=keyid
EOF
quietly openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 825 -extfile server.ext \
    -out server.pem
rm -f ca.srl
echo "certificates/ holds ca.pem (give it to the clients), server.pem, server.key (for the server), ca.key (keep it)"
