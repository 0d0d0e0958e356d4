// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/plimsoll-bench/plimsoll/clusters"
)

// bzImage is the head of a kernel's image with a version.
func bzImage(version string) []byte {
	b := make([]byte, 0x1000)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x300)
	copy(b[0x500:], version+"\x00")
	return b
}

func TestOpenKernel(t *testing.T) {
	dir := t.TempDir()
	image, modules := filepath.Join(dir, "boot", "vmlinuz"), filepath.Join(dir, "lib", "modules", "6.12.1-test")
	for _, d := range []string{filepath.Dir(image), modules} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(image, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(bzImage("6.12.1-test (somebody@somewhere) #1 SMP"))
	k, err := OpenKernel(image)
	if err != nil || k.Release != "6.12.1-test" || filepath.Clean(k.Modules) != modules {
		t.Errorf("want 6.12.1-test with modules in %s, got %+v, %v", modules, k, err)
	}
	write(bzImage("6.12.2-test"))
	if k, err := OpenKernel(image); err != nil || k.Release != "6.12.2-test" || k.Modules != "" {
		t.Errorf("want one without modules, got %+v, %v", k, err)
	}
	far := bzImage("6.12.1-test")
	binary.LittleEndian.PutUint16(far[0x20e:], 0xffff)
	for what, b := range map[string][]byte{"is no bzImage": make([]byte, 0x1000), "too short": {1}, "does not tell its version": far} {
		write(b)
		if _, err := OpenKernel(image); !errors.Is(err, clusters.ErrNotSupported) || !strings.Contains(err.Error(), what) {
			t.Errorf("want %q, got %v", what, err)
		}
	}
	if _, err := OpenKernel(filepath.Join(dir, "none")); !errors.Is(err, clusters.ErrNotSupported) {
		t.Errorf("none: %v", err)
	}
}

// The newest package is the one with the greatest numbers, not the last by its letters.
func TestNewestPackage(t *testing.T) {
	names := []string{"linux-image-6.12.9+deb12-cloud-amd64", "linux-image-6.12.117+deb12-cloud-amd64", "linux-image-6.12.43+deb13-cloud-amd64"}
	if got := slices.MaxFunc(names, compareVersions); got != names[1] {
		t.Errorf("newest of %v is %s", names, got)
	}
}

// The same files make the same archive, and another program another one.
func TestInitramfs(t *testing.T) {
	dir, report := t.TempDir(), func(string) {}
	program := filepath.Join(dir, "plimsoll")
	build := func(content string) string {
		t.Helper()
		if err := os.WriteFile(program, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
		file, err := BuildInitramfs(t.Context(), filepath.Join(dir, "cache"), Kernel{Release: "none"}, Programs{Plimsoll: program}, report)
		if errors.Is(err, clusters.ErrNotSupported) {
			t.Skipf("skipped: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
		return file
	}
	first := build("one")
	want, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	if other := build("another"); other == first {
		t.Error("another program makes the same archive")
	}
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(build("one"))
	if err != nil || !bytes.Equal(want, got) {
		t.Errorf("made again it has other bytes: %v", err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(got)))
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for _, r := range records {
		if dir := filepath.Dir(r.Name); dir != "." && !seen[dir] {
			t.Errorf("%s comes before its folder", r.Name)
		}
		if seen[r.Name] {
			t.Errorf("%s is there twice", r.Name)
		}
		seen[r.Name] = true
	}
	for _, name := range []string{"init", "usr/local/bin/plimsoll", "dev/console", "etc/protocols", "usr/sbin/modprobe"} {
		if !seen[name] {
			t.Errorf("%s is not there", name)
		}
	}
}
