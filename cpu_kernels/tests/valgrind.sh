#!/bin/sh
# valgrind.sh BUILD: runs the kernel tests of a build without sanitizers under valgrind, with fewer sizes; minutes.
# valgrind 3.19 shows programs a CPU with AVX2 and without AVX-512, and does not flush denormals: what a test says
# about those is of no account here, what valgrind says is.
set -eu
status=0
for test in handlers reductions attention elementwise; do
  program=$1/cpu_kernels/tests/test_$test
  test -x "$program"
  echo "== $test"
  valgrind -q --leak-check=full "$program" --thin >"$1/valgrind.out" 2>"$1/valgrind.log" || true
  if grep -v '^FAILED: ' "$1/valgrind.log"; then
    status=1
  fi
  tail -n 1 "$1/valgrind.out"
done
exit "$status"
