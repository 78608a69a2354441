#!/usr/bin/env bash
# Make the certificates for TLS: a certificate authority of your own, and a certificate for the server with each ADDRESS
# that clients use for it. Writes ca.pem, ca.key, server.pem and server.key to the folder certificates/. An authority that
# exists is kept, so that the ca.pem of the clients stays valid.
#     deploy/make_certificates.sh 192.168.1.10 laptop.local
set -eu
unset CDPATH BASH_ENV && unalias -a && unset -f $(compgen -A function) # what users have for their own shell
fail() {
    echo "make_certificates.sh: $*" >&2
    exit 2
}
[ $# -gt 0 ] || fail "name each ADDRESS that clients use for the server (see --help)"
names=
for address in "$@"; do
    case $address in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    -*) fail "there is no option $address (see --help)" ;;
    '' | *[!a-zA-Z0-9.:_-]*) fail "$address is neither a name nor an IP address" ;;
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
trap 'rm -f "$log" server.csr server.ext ca.srl ./*.part' EXIT
quietly() {
    "$@" 2>"$log" || fail "openssl: $(tail -n 1 "$log")"
}
command -v openssl >/dev/null || fail "there is no openssl: sudo apt-get install openssl"
if [ ! -f ca.key ]; then
    quietly openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj "/CN=FL-IoT certificate authority" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key.part -out ca.pem
    mv ca.key.part ca.key
fi
quietly openssl req -newkey rsa:3072 -nodes -subj "/CN=FL-IoT server" -keyout server.key.part -out server.csr
cat >server.ext <<EOF
subjectAltName=$names
basicConstraints=CA:FALSE
keyUsage=digitalSignature,keyEncipherment
extendedKeyUsage=serverAuth
authorityKeyIdentifier=keyid
EOF
quietly openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 825 -extfile server.ext \
    -out server.pem.part
mv server.key.part server.key
mv server.pem.part server.pem
echo "certificates/ has ca.pem (copy it to the clients), server.pem and server.key (for the server), ca.key (keep it safe)"
