#!/bin/sh
# valgrind.sh BUILD: runs the kernel tests of a build without sanitizers, and with XLA's headers, under
# valgrind, with fewer sizes; minutes. valgrind 3.19 shows programs a CPU with AVX2 and without AVX-512, and
# does not flush denormals: that a test fails there (exit code 1) is of no account here, what valgrind says (99)
# is, and so is any other end.
set -eu
build=${1:?usage: valgrind.sh BUILD}
command -v valgrind >/dev/null || { echo "valgrind.sh: valgrind is not installed" >&2; exit 1; }
for test in handlers reductions attention elementwise; do
  program=$build/cpu_kernels/tests/test_$test
  test -x "$program" || { echo "valgrind.sh: no program $program" >&2; exit 1; }
done
status=0
for test in handlers reductions attention elementwise; do
  echo "== $test"
  code=0
  valgrind -q --leak-check=full --error-exitcode=99 --log-file="$build/valgrind.log" \
    "$build/cpu_kernels/tests/test_$test" --thin >"$build/valgrind.out" 2>&1 || code=$?
  tail -n 1 "$build/valgrind.out"
  if [ "$code" -gt 1 ]; then
    echo "exit code $code"
    cat "$build/valgrind.log"
    status=1
  fi
done
exit "$status"
