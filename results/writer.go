// SPDX-License-Identifier: Apache-2.0

package results

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Writer appends records to a run's folder. Its methods may be called from several goroutines.
type Writer struct {
	dir string

	mu   sync.Mutex
	file *os.File // nil once closed
	err  error    // the first failed write; everything after it fails alike
}

// Create makes dir, where needed, and begins a run in it. A folder that holds
// a run already is refused, so that no measurement is overwritten.
func Create(dir string, env Environment) (*Writer, error) {
	if err := MakeDir(dir); err != nil {
		return nil, fmt.Errorf("create run: %w", err)
	}
	name := filepath.Join(dir, RecordsFile)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s %w: choose another folder or remove it", dir, ErrHoldsRun)
	}
	if err != nil {
		return nil, fmt.Errorf("create run: %w", err)
	}
	w := &Writer{dir: dir, file: f}
	err = Own(name)
	if err == nil {
		err = w.write([]byte(header(env)))
	}
	if err == nil {
		err = w.writeEnvironment(env)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create run: %w", err), w.Close(), os.Remove(name))
	}
	return w, nil
}

// ErrHoldsRun is wrapped by Create's error for a folder that is not empty of records.
var ErrHoldsRun = errors.New("holds a run already")

// Extend goes on with the run of a folder elsewhere, as in guests beside a lab. It returns the run's environment with the modes, versions and
// extras of env that it has not.
func Extend(dir string, env Environment) (*Writer, Environment, error) {
	run, err := Read(dir)
	if err != nil {
		return nil, env, fmt.Errorf("extend run: %w", err)
	}
	merged := run.Environment
	for _, m := range env.Modes {
		if !slices.ContainsFunc(merged.Modes, func(has Mode) bool { return has.Name == m.Name }) {
			merged.Modes = append(merged.Modes, m)
		}
	}
	for _, pair := range []struct {
		into *map[string]string
		from map[string]string
	}{{&merged.Versions, env.Versions}, {&merged.Extra, env.Extra}} {
		all := map[string]string{}
		maps.Copy(all, pair.from)
		maps.Copy(all, *pair.into)
		*pair.into = all
	}
	for _, s := range env.Plan.Scenarios {
		if !slices.Contains(merged.Plan.Scenarios, s) {
			merged.Plan.Scenarios = append(merged.Plan.Scenarios, s)
		}
	}
	merged.End = time.Time{}
	f, err := os.OpenFile(filepath.Join(dir, RecordsFile), os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, env, fmt.Errorf("extend run: %w", err)
	}
	w := &Writer{dir: dir, file: f}
	if err := w.writeEnvironment(merged); err != nil {
		return nil, env, errors.Join(fmt.Errorf("extend run: %w", err), w.Close())
	}
	return w, merged, nil
}

// Append writes r and returns when the kernel has it: what was appended survives a crash of
// this process. After an error, as when the disk is full, every later call returns that error.
func (w *Writer) Append(r Record) error {
	b, err := r.encode()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.write(b)
}

// Finish writes env, whose End the caller has set, and closes the run.
func (w *Writer) Finish(env Environment) error {
	w.mu.Lock()
	err := w.err
	if err == nil && w.file != nil {
		err = w.file.Sync()
	}
	w.mu.Unlock()
	return errors.Join(err, w.writeEnvironment(env), w.Close())
}

// Close ends the run as it is: the environment keeps a zero End, which the report calls unfinished.
// A second call, or one after Finish, does nothing.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	return err
}

// write is called with mu held, or before anyone else knows w.
func (w *Writer) write(b []byte) error {
	if w.err != nil {
		return w.err
	}
	if w.file == nil {
		return fmt.Errorf("append to %s: the run is closed", w.dir)
	}
	// One write a record, unbuffered: there is nothing to flush and nothing to lose.
	if _, err := w.file.Write(b); err != nil {
		w.err = fmt.Errorf("records cannot be kept: %w", err)
	}
	return w.err
}

func (w *Writer) writeEnvironment(env Environment) error {
	b, err := json.MarshalIndent(env, "", "  ")
	if err != nil {
		return fmt.Errorf("write environment: %w", err)
	}
	return WriteFile(filepath.Join(w.dir, EnvironmentFile), append(b, '\n'))
}

// header returns the configuration lines that benchstat shows above its tables and can group by.
func header(env Environment) string {
	lines := [][2]string{
		{"goos", env.GOOS}, {"goarch", env.GOARCH}, {"cpu", env.CPU}, {"kernel", env.Kernel},
		{"commit", env.Commit}, {"go", env.Go}, {"run", env.Run}, {"seed", strconv.FormatInt(env.Seed, 10)},
	}
	if env.Dirty {
		lines = append(lines, [2]string{"dirty", "true"})
	}
	for _, m := range []map[string]string{env.Versions, env.Settings} {
		var keys []string
		for k := range m {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			lines = append(lines, [2]string{configKey(k), m[k]})
		}
	}
	var b strings.Builder
	for _, l := range lines {
		if v := strings.Join(strings.Fields(l[1]), " "); l[0] != "" && v != "" {
			fmt.Fprintf(&b, "%s: %s\n", l[0], v)
		}
	}
	b.WriteByte('\n')
	return b.String()
}

// configKey makes a key that the benchmark format reads: it begins with a lower-case letter and has neither spaces, colons nor capitals.
func configKey(s string) string {
	s = strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '/' {
			return c
		}
		return '-'
	}, strings.ToLower(s))
	return strings.TrimLeft(s, "-./_0123456789")
}

// WriteFile replaces name by b whole, or leaves it as it was: a reader never sees half a file.
func WriteFile(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close(), Own(f.Name()))
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", name, err), os.Remove(f.Name()))
	}
	return nil
}

// MakeDir makes dir and the folders above it that do not exist, each owned like a run's files.
func MakeDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := MakeDir(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return Own(dir)
}

// Own gives name to the user who called sudo: a run needs root, its results do not.
func Own(name string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	uid, err := strconv.Atoi(os.Getenv("SUDO_UID"))
	if err != nil {
		return nil // not under sudo
	}
	gid, err := strconv.Atoi(os.Getenv("SUDO_GID"))
	if err != nil {
		gid = -1
	}
	if err := os.Lchown(name, uid, gid); err != nil {
		return fmt.Errorf("give %s to the user who called sudo: %w", name, err)
	}
	return nil
}
