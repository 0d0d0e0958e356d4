// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// A Kernel is what a machine boots.
type Kernel struct {
	// Release is what uname -r says there.
	Release string
	// Image is the file of its bzImage, Modules the folder of its modules; empty where there are none.
	Image, Modules string
}

// packagePattern finds the packages of Debian's stock kernel 6.12 for virtual machines, the one that figures are compared by.
const packagePattern = `^linux-image-6\.12\.[0-9]+.*-cloud-amd64$`

// PackageOf is the package with a kernel of a release.
func PackageOf(release string) string { return "linux-image-" + release }

// FetchKernel unpacks a kernel's package of the distribution into a folder of cache, once, and opens what is in it: or several packages, with commas
// between them, where modules have one of their own, as Ubuntu's. An empty name stands for the newest of Debian's kernels 6.12 that is in the
// cache already, or else that can be had now. Errors wrap clusters.ErrNotSupported.
func FetchKernel(ctx context.Context, cache, name string, report func(string)) (Kernel, error) {
	if name == "" {
		if k, err := KeptKernel(cache); !errors.Is(err, fs.ErrNotExist) {
			return k, err
		}
	} else if dir := shelfOf(shelves(cache), name); isUnpacked(dir) {
		return openShelf(dir)
	}
	k, err := unpackKernel(ctx, shelves(cache), name, report)
	if err != nil && ctx.Err() == nil {
		return k, fmt.Errorf("no kernel for guests (--kernel PATH names one): %w: %w", err, clusters.ErrNotSupported)
	}
	return k, err
}

// KeptKernel opens the newest of Debian's kernels 6.12 that FetchKernel has unpacked. Errors wrap fs.ErrNotExist where there is none.
func KeptKernel(cache string) (Kernel, error) {
	kept, err := filepath.Glob(filepath.Join(shelves(cache), "linux-image-6.12.*-cloud-amd64", unpackedStamp))
	if err != nil {
		return Kernel{}, err
	}
	if len(kept) == 0 {
		return Kernel{}, fmt.Errorf("kernel for guests: %w", fs.ErrNotExist)
	}
	return openShelf(filepath.Dir(slices.MaxFunc(kept, compareVersions)))
}

// shelfOf is the folder of a kernel's package, or of several with commas between them.
func shelfOf(shelves, name string) string {
	return filepath.Join(shelves, strings.ReplaceAll(name, ",", "+"))
}

func isUnpacked(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, unpackedStamp))
	return err == nil
}

// shelves is the folder of unpacked packages.
func shelves(cache string) string { return filepath.Join(cache, "kernels") }

// unpackedStamp is a file in the folder of a package that is there as a whole.
const unpackedStamp = "unpacked"

func unpackKernel(ctx context.Context, shelves, name string, report func(string)) (_ Kernel, err error) {
	report("downloading a kernel's package")
	// Made under another name, for no run may find a half of it.
	if err := os.MkdirAll(shelves, 0o755); err != nil {
		return Kernel{}, err
	}
	temporary, err := os.MkdirTemp(shelves, ".unpacking-")
	if err != nil {
		return Kernel{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temporary)) }()
	shelf, err := host.NewShelf(ctx, temporary)
	if err != nil {
		return Kernel{}, err
	}
	if name == "" {
		found, err := shelf.Search(ctx, packagePattern)
		if err != nil {
			return Kernel{}, err
		}
		if len(found) == 0 {
			return Kernel{}, fmt.Errorf("no package is called %s", packagePattern)
		}
		name = slices.MaxFunc(found, compareVersions)
	}
	report("unpacking " + name)
	if err := errors.Join(shelf.Unpack(ctx, strings.Split(name, ",")...), shelf.Close()); err != nil {
		return Kernel{}, err
	}
	if _, err := openShelf(temporary); err != nil {
		return Kernel{}, err
	}
	if err := os.WriteFile(filepath.Join(temporary, unpackedStamp), nil, 0o644); err != nil {
		return Kernel{}, err
	}
	dir := shelfOf(shelves, name)
	if err := os.Rename(temporary, dir); err != nil && !errors.Is(err, os.ErrExist) { // else somebody else was faster
		return Kernel{}, err
	}
	return openShelf(dir)
}

// openShelf opens the kernel of an unpacked package.
func openShelf(dir string) (Kernel, error) {
	images, err := filepath.Glob(filepath.Join(dir, "root", "boot", "vmlinuz-*"))
	if err != nil {
		return Kernel{}, err
	}
	if len(images) != 1 {
		return Kernel{}, fmt.Errorf("%d kernels are in the package of %s, want one", len(images), dir)
	}
	return OpenKernel(images[0])
}

// OpenKernel opens the bzImage of a file, whose modules are in lib/modules/RELEASE beside the image's folder, or of the root. Errors wrap
// clusters.ErrNotSupported.
func OpenKernel(image string) (Kernel, error) {
	release, err := imageRelease(image)
	if err != nil {
		return Kernel{}, fmt.Errorf("kernel %s: %w: %w", image, err, clusters.ErrNotSupported)
	}
	k := Kernel{Release: release, Image: image}
	for _, root := range []string{filepath.Join(filepath.Dir(image), ".."), "/"} {
		dir := filepath.Join(root, "lib", "modules", release)
		if _, err := os.Stat(dir); err == nil {
			k.Modules = dir
			break
		}
	}
	return k, nil
}

// imageRelease reads the release from a bzImage's header (Documentation/arch/x86/boot.rst: header at 0x202, kernel_version at 0x20e).
func imageRelease(image string) (string, error) {
	f, err := os.Open(image)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 0x8000)
	n, err := f.ReadAt(head, 0)
	if head = head[:n]; n < 0x210 {
		return "", fmt.Errorf("is too short for a bzImage: %w", err)
	}
	if string(head[0x202:0x206]) != "HdrS" {
		return "", errors.New("is no bzImage")
	}
	at := int(binary.LittleEndian.Uint16(head[0x20e:])) + 0x200
	if at >= len(head) {
		return "", errors.New("does not tell its version")
	}
	version, _, _ := bytes.Cut(head[at:], []byte{0})
	release, _, _ := strings.Cut(string(version), " ")
	return release, nil
}

var digits = regexp.MustCompile(`\d+`)

// compareVersions orders names by the numbers in them.
func compareVersions(a, b string) int {
	numbers := func(s string) (all []int) {
		for _, d := range digits.FindAllString(s, -1) {
			n, _ := strconv.Atoi(d) // longer ones are no versions
			all = append(all, n)
		}
		return all
	}
	return cmp.Or(slices.Compare(numbers(a), numbers(b)), strings.Compare(a, b))
}
