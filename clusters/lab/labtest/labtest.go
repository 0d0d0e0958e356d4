// SPDX-License-Identifier: Apache-2.0

// Package labtest says whether a test can stand up a lab here.
package labtest

import (
	"os"
	"path/filepath"
	"testing"
)

// Bin returns the absolute path of dir when it holds the programs that a lab runs, and skips the test where they or root are
// missing.
func Bin(tb testing.TB, dir string) string {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root")
	}
	bin, err := filepath.Abs(dir)
	if err != nil {
		tb.Fatal(err)
	}
	for _, name := range []string{"etcd", "kube-apiserver", "kube-proxy"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			tb.Skipf("needs %s in bin/: make build makes it", name)
		}
	}
	return bin
}
