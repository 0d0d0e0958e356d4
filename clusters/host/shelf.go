// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A Shelf is a folder with packages of the distribution, Debian or a child of it, unpacked. Nothing is installed: maintainer scripts do not run,
// and the host's package lists stay as they are.
type Shelf struct {
	// Root is the folder where the packages' files are.
	Root             string
	dir, debs, lists string
}

// NewShelf makes a shelf in dir, with the newest package lists and no packages. Close it when all are unpacked.
func NewShelf(ctx context.Context, dir string) (*Shelf, error) {
	for _, program := range []string{"apt-get", "apt-cache", "dpkg-deb", "tar"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%s is not on this host: its distribution is no child of Debian", program)
		}
	}
	s := &Shelf{Root: filepath.Join(dir, "root"), dir: dir, debs: filepath.Join(dir, "debs"), lists: filepath.Join(dir, "lists")}
	if err := os.RemoveAll(s.Root); err != nil {
		return nil, err
	}
	for _, d := range []string{filepath.Join(s.debs, "partial"), filepath.Join(s.lists, "partial"), filepath.Join(s.Root, "etc"), filepath.Join(s.Root, "usr")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	// Packages from before the merge of /usr have /lib and /sbin of their own.
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(s.Root, "usr", name), 0o755), os.Symlink("usr/"+name, filepath.Join(s.Root, name))); err != nil {
			return nil, err
		}
	}
	if err := Quietly(s.apt(ctx, "apt-get", "update")); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close removes what was wanted for unpacking alone.
func (s *Shelf) Close() error { return errors.Join(os.RemoveAll(s.debs), os.RemoveAll(s.lists)) }

// Search returns the names of packages that match a regular expression of apt-cache(8), sorted.
func (s *Shelf) Search(ctx context.Context, pattern string) ([]string, error) {
	cmd := s.apt(ctx, "apt-cache", "search", "--names-only", pattern)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// Unpack brings packages to the shelf, and nothing that they depend on.
func (s *Shelf) Unpack(ctx context.Context, packages ...string) error {
	download := s.apt(ctx, "apt-get", append([]string{"download"}, packages...)...)
	download.Dir = s.debs
	return s.unpack(ctx, download)
}

// UnpackWhole brings packages to the shelf with all that they depend on and the host has not.
func (s *Shelf) UnpackWhole(ctx context.Context, packages ...string) error {
	return s.unpack(ctx, s.apt(ctx, "apt-get", append([]string{"install", "--download-only", "--yes", "--no-install-recommends", "--reinstall"}, packages...)...))
}

func (s *Shelf) unpack(ctx context.Context, download *exec.Cmd) error {
	if err := Quietly(download); err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(s.debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range found {
		if err := errors.Join(extract(ctx, deb, s.Root), os.Remove(deb)); err != nil {
			return err
		}
	}
	return nil
}

func (s *Shelf) apt(ctx context.Context, program string, args ...string) *exec.Cmd {
	options := []string{
		"-q", "-o", "Dir::State::lists=" + s.lists, "-o", "Dir::Cache::archives=" + s.debs, "-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=",
		"-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1",
	}
	return exec.CommandContext(ctx, program, append(options, args...)...)
}

// extract lays a package's files below root, through the links of a merged /usr.
func extract(ctx context.Context, deb, root string) error {
	unpack := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	lay := exec.CommandContext(ctx, "tar", "--extract", "--no-same-owner", "--keep-directory-symlink", "--directory", root)
	pipe, err := unpack.StdoutPipe()
	if err != nil {
		return err
	}
	lay.Stdin = pipe
	if err := unpack.Start(); err != nil {
		return err
	}
	return errors.Join(Quietly(lay), unpack.Wait())
}

// Quietly runs a command; its error carries the command's line and the end of what it said.
func Quietly(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, lines[len(lines)-1])
	}
	return nil
}
