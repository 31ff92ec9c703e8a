#!/bin/sh
# Writes the secrets of compose.yaml, a file each, into the folder named (default: secrets beside this script).
# A file that is there is kept. The folder is yours alone; the files can be read inside the containers, whose users differ.
set -eu

folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

keep_or_write() {
    [ -e "$folder/$1" ] || printf '%s' "$2" > "$folder/$1"
    chmod 444 "$folder/$1"
}

keep_or_write s3_secret_key "$(random)"
keep_or_write milvus_s3_secret_key "$(random)"
# Milvus takes its root password out of this token, so the two cannot differ.
keep_or_write milvus_token "root:$(random)"
keep_or_write mysql_root_password "$(random)"
keep_or_write mysql_password "$(random)"
keep_or_write database_url "mysql+aiomysql://image_search:$(cat "$folder/mysql_password")@mysql:3306/image_search"
keep_or_write grafana_password "$(random)"
