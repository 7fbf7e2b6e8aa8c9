#!/bin/sh
# check_symbols.sh NM OBJECT: fails if the object defines a weak symbol, or exports more than what fills its
# kernel table.
set -eu
symbols=$("$1" --defined-only "$2")
if printf '%s\n' "$symbols" | grep -E ' [wWvVu] '; then
  echo "weak symbols in $2 (above): the linker could mix instruction sets" >&2
  exit 1
fi
exported=$(printf '%s\n' "$symbols" | awk '$2 ~ /^[A-Z]$/ { print $3 }')
case "$exported" in
  *"
"* | '')
    echo "$2 exports: $exported; expected what fills its kernel table alone" >&2
    exit 1
    ;;
  *fill_*KernelTable*) echo "$2 exports $exported" ;;
  *)
    echo "$2 exports $exported, expected what fills a kernel table" >&2
    exit 1
    ;;
esac
