// SPDX-License-Identifier: Apache-2.0

package lab

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

// cgroup is one cgroup2 folder.
type cgroup struct {
	dir string
}

func newCgroup(dir string) (*cgroup, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	return &cgroup{dir: dir}, nil
}

// child makes a cgroup below this one.
func (c *cgroup) child(name string) (*cgroup, error) {
	return newCgroup(filepath.Join(c.dir, name))
}

// kill ends every process below c at once (cgroup.kill, Linux 5.14 or newer) and returns when the kernel counts none.
func (c *cgroup) kill(ctx context.Context) error {
	if err := os.WriteFile(filepath.Join(c.dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return c.await(ctx, "populated 0")
}

// freeze stops or resumes every process below c and returns when the kernel says that it is so.
func (c *cgroup) freeze(ctx context.Context, frozen bool) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	word := "0"
	if frozen {
		word = "1"
	}
	if err := os.WriteFile(filepath.Join(c.dir, "cgroup.freeze"), []byte(word), 0); err != nil {
		return fmt.Errorf("freeze cgroup: %w", err)
	}
	return c.await(ctx, "frozen "+word)
}

// settleLimit is how long processes may take to freeze, or to die at the end of a run: each does so when it leaves the kernel,
// and a large rule set is one long stay there.
const settleLimit = 2 * time.Minute

// await returns when cgroup.events holds the line.
func (c *cgroup) await(ctx context.Context, line string) error {
	return poll(ctx, "cgroup "+c.dir+" to be "+line, func() (bool, error) {
		b, err := os.ReadFile(filepath.Join(c.dir, "cgroup.events"))
		return strings.Contains("\n"+string(b), "\n"+line+"\n"), err
	})
}

// remove kills what runs below c and removes the folders, deepest first. One that is gone already is no error.
func (c *cgroup) remove(ctx context.Context) error {
	if _, err := os.Stat(c.dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	settle, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	if err := c.kill(settle); err != nil {
		return err
	}
	var dirs []string
	err := filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
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
