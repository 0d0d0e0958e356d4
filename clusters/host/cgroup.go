// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Cgroup is one cgroup2 folder.
type Cgroup struct {
	Dir string
}

// NewCgroup makes the folder dir.
func NewCgroup(dir string) (*Cgroup, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	return &Cgroup{Dir: dir}, nil
}

// Child makes a cgroup below this one.
func (c *Cgroup) Child(name string) (*Cgroup, error) {
	return NewCgroup(filepath.Join(c.Dir, name))
}

// Kill ends every process below c at once (cgroup.kill, Linux 5.14 or newer) and returns when the kernel counts none. A folder that
// is gone, or that its owner removes meanwhile, holds none.
func (c *Cgroup) Kill(ctx context.Context) error {
	err := os.WriteFile(filepath.Join(c.Dir, "cgroup.kill"), []byte("1"), 0)
	if err == nil {
		err = c.await(ctx, "populated 0")
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return nil
}

// Freeze stops every process below c and returns when the kernel says that it is so, or resumes those whom no folder above keeps
// frozen.
func (c *Cgroup) Freeze(ctx context.Context, frozen bool) error {
	ctx, cancel := context.WithTimeout(ctx, SettleLimit)
	defer cancel()
	word := "0"
	if frozen {
		word = "1"
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "cgroup.freeze"), []byte(word), 0); err != nil || !frozen {
		return err
	}
	return c.await(ctx, "frozen 1")
}

// Populated says whether a process is in c or below it.
func (c *Cgroup) Populated() (bool, error) {
	b, err := os.ReadFile(filepath.Join(c.Dir, "cgroup.events"))
	return strings.Contains("\n"+string(b), "\npopulated 1\n"), err
}

// SettleLimit is how long processes may take to freeze, or to die at the end of a run: each does so when it leaves the kernel,
// and a large rule set is one long stay there.
const SettleLimit = 2 * time.Minute

// await returns when cgroup.events holds the line, or at once when it cannot be read.
func (c *Cgroup) await(ctx context.Context, line string) error {
	var failed error
	err := Poll(ctx, "cgroup "+c.Dir+" to be "+line, func() (bool, error) {
		var b []byte
		b, failed = os.ReadFile(filepath.Join(c.Dir, "cgroup.events"))
		return failed != nil || strings.Contains("\n"+string(b), "\n"+line+"\n"), nil
	})
	return errors.Join(err, failed)
}

// Remove kills what runs below c and removes the folders, deepest first. One that is gone already is no error.
func (c *Cgroup) Remove(ctx context.Context) error {
	if _, err := os.Stat(c.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	settle, cancel := context.WithTimeout(ctx, SettleLimit)
	defer cancel()
	if err := c.Kill(settle); err != nil {
		return err
	}
	var dirs []string
	err := filepath.WalkDir(c.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		err = errors.Join(err, os.Remove(dirs[i]))
	}
	return err
}
