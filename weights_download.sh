#!/usr/bin/env bash
# Fetch a base checkpoint into checkpoints/NAME, or the commonsense data into data/.
# Needs bash (3.2, which macOS has, will do) and curl. It does not look inside a checkpoint.
#
#   ./weights_download.sh llama-7b          ./weights_download.sh data
#   ./weights_download.sh OWNER/NAME        any LLaMA that the hub has as safetensors
#   ./weights_download.sh --list            ./weights_download.sh --dry-run llama-13b
#   ./weights_download.sh llama-7b@main     another commit, branch or tag than the pinned one;
#                                           or --revision main
#
# HF_ENDPOINT    another hub (default https://huggingface.co)
# GITHUB_RAW     another https://raw.githubusercontent.com
# RETRY_SECONDS  pause after a broken connection (default 3)
# HF_TOKEN       for gated repositories; else the file $HF_HOME/token (default
#                ~/.cache/huggingface/token). Never printed.
# Exit codes: 0 done, 1 network, access or disk, 2 usage, 3 wrong content. Run it again to resume.

set -uo pipefail
export LC_ALL=C # [A-Z] means ASCII, tools count bytes

# What is pinned, and how, stands in this table: a row a checkpoint. The commit that was used is
# kept in checkpoints/NAME/REVISION, and a later run stays with it: two never mix.
HERE=$(cd "$(dirname "$0")" && pwd) || exit 1
CHECKPOINTS=$(awk '/^[^# ]/ && $2 != "-"' "$HERE/plumbing/checkpoints.txt") || exit 1
# Hashes known from elsewhere: at the pinned commit the hub, or a mirror, has to name the same ones.
KNOWN='
llama2-7b/model-00001-of-00002.safetensors 4ec71fd53e99766de38f24753b30c9e8942630e9e576a1ba27b0ec531e87be41
llama2-7b/model-00002-of-00002.safetensors 41780b5dac322ac35598737e99208d90bdc632a1ba3389ebedbb46a1d8385a7f'

# The data: LLM-Adapters at one commit. 64 digits are a sha256, 40 a git blob id; a blob id covers
# the length too, so that "~size" (not confirmed) serves the space check only.
DATA_REPO=AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a
DATA='
ft-training_set/commonsense_170k.json ~98000000 529e426b33d4cdb1d0c4a275a1a7245ad081fd91
dataset/boolq/test.json 899151 89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9
dataset/piqa/test.json 913157 3860d11b9b42e590b6b4bbc1643214d373ed0b0d4ac62fcc7bdceb8e044ad141
dataset/social_i_qa/test.json 843748 71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d
dataset/hellaswag/test.json ~11099046 183c4920415f83ba4b793c4873a33e7e10bd1be5
dataset/winogrande/test.json 497409 6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9
dataset/ARC-Easy/test.json 1157216 3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc
dataset/ARC-Challenge/test.json 622510 4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7
dataset/openbookqa/test.json 202545 8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e'

# -------------------------------------------------------------------------------- small tools

say() { printf '%s\n' "$*"; }
die() { # CODE MESSAGE; not inside $( ): it would end only that
    printf 'weights_download.sh: %s\n' "$2" >&2
    exit "$1"
}
human() {
    awk -v b="$1" 'BEGIN { if (b >= 1e9) printf "%.2f GB", b / 1e9
        else if (b >= 1e6) printf "%.1f MB", b / 1e6; else printf "%d B", b }'
}
bytes() { if [ -f "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi; }
digest() { # 1 or 256, content on stdin; Linux has sha256sum, macOS shasum
    {
        if command -v "sha$1sum" > /dev/null; then "sha$1sum"; else shasum -a "$1"; fi
    } | cut -d' ' -f1
}
hash_of() { # FILE in the kind of the hash given as $2
    case ${#2} in
        64) digest 256 < "$1" ;;
        40) # what git would call this content
            { printf 'blob %d\0' "$(bytes "$1")"; cat "$1"; } | digest 1 ;;
    esac
}

# JSON on stdin -> lines "path<TAB>value", e.g. "siblings/3/lfs/sha256<TAB>4ec71f". grep cuts it
# into tokens (a string with its escapes is one token, so braces and quotes inside of strings do no
# harm); awk keeps the stack.
json() {
    grep -oE '"([^"\\]|\\.)*"|[][{},:]|[^][{},:"[:space:]]+' | awk '
        $0 == "{" || $0 == "[" { key[++d] = 0; object[d] = named[d] = ($0 == "{"); next }
        $0 == "}" || $0 == "]" { d--; next }
        $0 == ","              { if (object[d]) named[d] = 1; else key[d]++; next }
        $0 == ":"              { named[d] = 0; next }
                               { value = $0; if (sub(/^"/, "", value)) sub(/"$/, "", value) }
        named[d]               { key[d] = value; next }
        {
            for (i = 1; i <= d; i++) printf "%s%s", key[i], (i < d ? "/" : "\t")
            print value
        }'
}

# -------------------------------------------------------------------------------- one file

# For URL $1, read by curl -K: an argument could be seen in `ps`. Only the hub gets the token.
curl_options() {
    case $1 in "$ENDPOINT"/*)
        [ -z "$TOKEN" ] || printf 'header = "Authorization: Bearer %s"\n' "$TOKEN" ;;
    esac
    case $1 in https:*) echo 'proto-redir = "=https"' ;; esac
}

# URL to FILE.part, going on where it ends. Returns when the bytes are there (SIZE, or what the
# server calls all). -L drops the Authorization header at another host: the hub sends big files off
# to a CDN, which must not see the token.
download() { # URL FILE SIZE
    local url=$1 file=$2 part=$2.part size=$3 have now code rc denied idle=0 restarts=0
    while :; do
        have=$(bytes "$part")
        case $size in
            "~"*) ;;
            "$have") return ;;
            *) if [ "$have" -gt "$size" ]; then rm -f "$part"; have=0; fi ;;
        esac
        code=$(curl -K <(curl_options "$url") "$METER" -fL -C - -o "$part" -w '%{http_code}' \
            --connect-timeout 30 --speed-limit 1 --speed-time 60 "$url")
        rc=$?
        now=$(bytes "$part")
        case "$rc:$code" in
            *:416) return ;; # nothing behind our last byte: the hash decides
            0:*) if [ "${size#"~"}" != "$size" ] || [ "$now" -ge "$size" ]; then return; fi ;;
            33:*) # no ranges on this server: all over again
                rm -f "$part"
                restarts=$((restarts + 1))
                if [ $restarts -lt 4 ]; then continue; fi
                die 1 "$url: the connection keeps breaking, and this server cannot resume" ;;
            23:* | 153:*)
                die 1 "cannot write $part beyond $(human "$now"): disk full? Run again to resume" ;;
            22:401 | 22:403)
                if [ -z "$PAGE" ]; then die 1 "$url: access denied (HTTP $code)"; fi
                denied="access denied (HTTP $code): accept the terms at $PAGE"
                if [ -z "$TOKEN" ]; then die 1 "$denied and set HF_TOKEN"; fi
                die 1 "$denied with your token's account, or renew it" ;;
            22:408 | 22:429 | 22:5??) ;;
            22:*)
                die 1 "$url: HTTP $code${PAGE:+: see $PAGE for what there is, or --revision}" ;;
        esac
        idle=$((now > have ? 0 : idle + 1))
        if [ $idle -ge 3 ]; then
            now=$(human "$now")
            die 1 "$url: no more bytes after $now (curl exit $rc, HTTP $code): run again to resume"
        fi
        say "    broke off at $(human "$now") (curl exit $rc, HTTP $code); going on"
        sleep "${RETRY_SECONDS:-3}"
    done
}

# FILE is there, and it is the one. Big files are not hashed again: they got their name after it.
present() { # FILE SIZE HASH
    local size=${2#"~"} now
    [ -e "$1" ] || return
    now=$(bytes "$1")
    if [ "$size" = "$2" ] && [ "$now" != "$size" ]; then
        die 3 "$1 has $now bytes, not $size: move it away"
    fi
    if [ "$now" -lt 200000000 ] && [ "$(hash_of "$1" "$3")" != "$3" ]; then
        die 3 "$1 is not the published file (expected hash $3): move it away and run again"
    fi
}

fetch() { # URL FILE SIZE HASH: FILE appears complete and checked, or not at all
    local got
    mkdir -p "$(dirname "$2")" || die 1 "cannot write in $(dirname "$2")"
    download "$1" "$2" "$3"
    got=$(hash_of "$2.part" "$4")
    if [ "$got" != "$4" ]; then
        rm -f "$2.part"
        die 3 "$1: wrong content (hash $got, expected $4); removed: run again, or try a mirror"
    fi
    mv "$2.part" "$2" || die 1 "cannot rename $2.part"
}

# -------------------------------------------------------------------------------- what to fetch

add() { # put the hub's file $1 on the plan as $2 (default: the same name)
    local size hash known
    read -r size hash < <(awk -F'\t' -v n="$1" '$1 == n { print $2, $3 }' "$TMP/files")
    [[ $size =~ ^[0-9]+$ && $hash =~ ^([0-9a-f]{40}|[0-9a-f]{64})$ ]] ||
        die 3 "$REPO at $SHA: $ENDPOINT names no $1, or no size and hash: see $PAGE/tree/$SHA"
    known=$(awk -v p="$NAME/$1" '$1 == p { print $2 }' <<< "$KNOWN")
    if [ -n "$known" ] && [ "$SHA" = "$PIN" ] && [ "$known" != "$hash" ]; then
        die 3 "$1: $ENDPOINT names sha256 $hash, published is $known: use another mirror"
    fi
    printf '%s\t%s\t%s\t%s\n' "$ENDPOINT/$REPO/resolve/$SHA/$1" "$DEST/${2:-$1}" "$size" "$hash" \
        >> "$TMP/plan"
}
has() { awk -F'\t' -v n="$1" '$1 == n { found = 1 } END { exit !found }' "$TMP/files"; }

plan_checkpoint() {
    local want=$REVISION kept="" ask index shard kind small url size hash commit='^[0-9a-f]{7,40}$'
    PAGE=https://huggingface.co/$REPO
    if [ -f "$DEST/REVISION" ]; then read -r kept < "$DEST/REVISION"; fi
    want=${want:-${kept:-$PIN}}
    ask=$want
    [[ $want =~ ^[A-Za-z0-9._/-]+$ && $want != *..* ]] ||
        die 2 "--revision $want: not a commit, branch or tag"
    if [[ $want =~ $commit && ${#want} -lt 40 ]]; then ask=main; fi # only a commit's first digits
    download "$ENDPOINT/api/models/$REPO/revision/${ask//\//%2F}?blobs=true" "$TMP/api" "~"
    json < "$TMP/api.part" > "$TMP/flat"
    SHA=$(awk -F'\t' '$1 == "sha" { print $2 }' "$TMP/flat")
    [[ $SHA =~ ^[0-9a-f]{40}$ ]] ||
        die 3 "$ENDPOINT/api/models/$REPO does not answer as a hub does: check HF_ENDPOINT"
    if [[ $want =~ $commit && $SHA != "$want"* ]]; then
        die 3 "$REPO: $ask is at $SHA, not at $want: see $PAGE/commits/main, choose with --revision"
    fi
    if [ -n "$kept" ] && [ "$kept" != "$SHA" ]; then
        die 2 "$DEST holds commit $kept, not $SHA: move it away first (two commits must not mix)"
    fi
    # name, size, hash: of a file in LFS what "lfs" says, of any other its own size and blob id
    awk -F'\t' '{ n = split($1, p, "/") }
        p[1] == "siblings" { v[p[2], p[3] (n > 3 ? "/" p[4] : "")] = $2 }
        p[1] == "siblings" && p[2] + 0 > last { last = p[2] + 0 }
        END { for (i = 0; i <= last; i++) { lfs = ((i, "lfs/sha256") in v)
                  print v[i, "rfilename"] "\t" (lfs ? v[i, "lfs/size"] : v[i, "size"]) "\t" \
                        (lfs ? v[i, "lfs/sha256"] : v[i, "blobId"]) } }' "$TMP/flat" > "$TMP/files"

    add config.json
    for small in $COMPANIONS; do if has "$small"; then add "$small"; fi; done
    if has tokenizer.model; then add tokenizer.model
    elif has original/tokenizer.model; then # Llama-3 keeps it with Meta's own files
        add original/tokenizer.model tokenizer.model
    elif ! has tokenizer.json; then
        die 3 "$REPO at $SHA has no tokenizer.model or .json: see $PAGE/tree/$SHA"
    fi
    # .bin is a pickle: second choice, and only from a repository in the table. Never .pth or .h5
    for kind in model.safetensors $PICKLE; do
        index=$kind.index.json
        if has "$kind"; then add "$kind"; return; fi
        if has "$index"; then
            add "$index"
            # Read a checked copy in the temporary folder: --dry-run writes nowhere else.
            IFS=$'\t' read -r url _ size hash < <(tail -n 1 "$TMP/plan")
            if present "$DEST/$index" "$size" "$hash"; then cp "$DEST/$index" "$TMP"
            else fetch "$url" "$TMP/$index" "$size" "$hash"; fi
            json < "$TMP/$index" | awk -F'\t' '$1 ~ /^weight_map\// { print $2 }' | sort -u \
                > "$TMP/shards"
            if [ ! -s "$TMP/shards" ]; then die 3 "$index names no file"; fi
            while IFS= read -r shard; do
                [[ $shard =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
                    die 3 "$index: unsafe file name '$shard'"
                [[ -n $PICKLE || $shard == *.safetensors ]] || die 3 "$index names $shard"
                add "$shard"
            done < "$TMP/shards"
            return
        fi
    done
    die 3 "$REPO at $SHA has no model.safetensors${PICKLE:+ and no $PICKLE}: see $PAGE/tree/$SHA"
}

plan_data() {
    local path size hash raw=${GITHUB_RAW:-https://raw.githubusercontent.com}
    while read -r path size hash; do
        if [ -n "$path" ]; then
            printf '%s\t%s\t%s\t%s\n' "$raw/$DATA_REPO/$path" "data/${path#*/}" "$size" "$hash" \
                >> "$TMP/plan"
        fi
    done <<< "$DATA"
}

# -------------------------------------------------------------------------------- main

usage() { sed -n '5,17s/^# \{0,1\}//p' "$0"; }
NAME="" REVISION="" DRY="" REPO="" PIN="" SHA="" PAGE="" TOKEN="${HF_TOKEN:-}"
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --list)
            say "$CHECKPOINTS" | awk '{ printf "%-19s %5s GB  %s @ %.12s\n", $1, $4, $2, $3 }'
            printf '%-19s %5s GB  %s @ %.12s\n' data 0.1 "${DATA_REPO%/*}" "${DATA_REPO##*/}"
            exit 0 ;;
        --dry-run) DRY=1 ;;
        --revision)
            if [ -z "${2:-}" ]; then die 2 "--revision needs a commit, branch or tag"; fi
            REVISION=$2
            shift ;;
        -*) die 2 "unknown flag $1: see --help" ;;
        *) if [ -n "$NAME" ]; then die 2 "one name at a time: $NAME or $1"; fi; NAME=$1 ;;
    esac
    shift
done
case $NAME in
    "") usage >&2; die 2 "which one? See --list" ;;
    *@?*) if [ -z "$REVISION" ]; then REVISION=${NAME#*@}; fi; NAME=${NAME%%@*} ;;
esac
ENDPOINT=${HF_ENDPOINT:-https://huggingface.co} ENDPOINT=${ENDPOINT%/}
PICKLE=pytorch_model.bin COMPANIONS="generation_config.json tokenizer.json tokenizer_config.json
    special_tokens_map.json added_tokens.json chat_template.jinja"
read -r _ REPO PIN _ < <(awk -v n="$NAME" '$1 == n' <<< "$CHECKPOINTS")
if [[ $NAME =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$ && $NAME != *..* ]]; then
    REPO=$NAME PIN=main PICKLE=""
fi
if [ -z "$REPO" ] && [ "$NAME" != data ]; then
    die 2 "no such name: $NAME. See --list, or give OWNER/NAME"
fi
if [ "$NAME" = data ] && [ -n "$REVISION" ]; then
    die 2 "data is pinned by hash: it takes no revision"
fi
command -v curl > /dev/null || die 1 "curl is not installed"

token_file=${HF_HOME:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/huggingface}/token
if [ -z "$TOKEN" ] && [ -f "$token_file" ]; then TOKEN=$(tr -d '[:space:]' < "$token_file"); fi
[[ $TOKEN =~ ^[A-Za-z0-9._~+/=-]*$ ]] ||
    die 2 "HF_TOKEN (or $token_file) does not look like a token"
version=$(curl --version | awk 'NR == 1 { split($2, v, "."); print v[1] * 1000 + v[2] }')
if [ -n "$TOKEN" ] && [ "$version" -lt 7058 ]; then
    die 1 "this curl is older than 7.58 and would hand the token to other hosts: update it"
fi
if [ -t 2 ]; then METER=--progress-bar; else METER=--silent; fi

cd "$HERE" || exit 1 # checkpoints/ and data/ stand beside this file
DEST=checkpoints/$NAME
TMP=$(mktemp -d "${TMPDIR:-/tmp}/weights.XXXXXX") || die 1 "cannot make a temporary folder"
trap 'rm -rf "$TMP"' EXIT
trap 'die 130 "stopped: run again to resume"' INT
trap 'die 143 "stopped: run again to resume"' TERM

if [ "$NAME" = data ]; then DEST=data; plan_data; else plan_checkpoint; fi

# Everything that can be known beforehand: what lies there already, whole or in part, and whether
# the rest has room.
total=0 todo=0 count=0
while IFS=$'\t' read -r url file size hash; do
    n=${size#"~"} have=$(bytes "$file.part") state=fetch
    if [ "$have" -gt 0 ]; then state="resume after $(human "$have")"; fi
    if present "$file" "$size" "$hash"; then have=$n state="already there"; fi
    count=$((count + 1)) total=$((total + n)) todo=$((todo + (n > have ? n - have : 0)))
    printf '%s\t%s\t%s\t%s\t%s\n' "$url" "$file" "$size" "$hash" "$state" >> "$TMP/steps"
done < "$TMP/plan"
disk=$DEST
while [ ! -e "$disk" ]; do disk=$(dirname "$disk"); done
# The field before the percentage: names with spaces may stand on both sides of the numbers.
free=$(df -Pk "$disk" | awk '
    NR == 2 {
        for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+%$/) { printf "%.0f", $(i - 1) * 1024; exit }
    }')
say "$NAME: ${REPO:-${DATA_REPO%/*}} @ ${SHA:-${DATA_REPO##*/}} -> $DEST"
say "$count files, $(human "$total"); to fetch $(human "$todo"), free $(human "${free:-0}")"
if [ -n "$free" ] && [ "$todo" -gt "$free" ]; then
    die 1 "not enough space: $NAME needs $(human "$todo") more, $disk has $(human "$free") free"
fi

if [ -z "$DRY" ] && [ -n "$SHA" ]; then
    { mkdir -p "$DEST" && echo "$SHA" > "$DEST/REVISION"; } || die 1 "cannot write in $DEST"
fi
i=0
while IFS=$'\t' read -r url file size hash state; do
    i=$((i + 1))
    say "[$i/$count] $file  $(human "${size#"~"}")  $state"
    if [ -z "$DRY" ] && [ "$state" != "already there" ]; then
        fetch "$url" "$file" "$size" "$hash"
    fi
done < "$TMP/steps"
if [ -z "$DRY" ]; then say "done: $DEST is complete${SHA:+, commit $SHA}"; fi
