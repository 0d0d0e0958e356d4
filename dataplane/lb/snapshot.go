// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// A Snapshot is what a load balancer held at a time, in a file: after a reboot, when nothing is pinned any more, Services are served by it
// until the API server answers.
//
// The file begins with a line that names its version and the SHA-256 of what follows, which is JSON. A file that is not so is not used.
type Snapshot struct {
	Time      time.Time
	Node      string
	Frontends []Change
}

// snapshotVersion is in the first line. It changes with what the fields mean.
const snapshotVersion = "plimsoll-snapshot-1"

// snapshotLimit is how large a file is read: ten times what 50,000 Services with two endpoints take.
const snapshotLimit = 256 << 20

// encode gives the file's bytes.
func (s Snapshot) encode() ([]byte, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return sign(body), nil
}

// sign puts the first line before what follows it.
func sign(body []byte) []byte {
	sum := sha256.Sum256(body)
	return append([]byte(snapshotVersion+" "+hex.EncodeToString(sum[:])+"\n"), body...)
}

// decodeSnapshot reads what encode gave.
func decodeSnapshot(b []byte) (Snapshot, error) {
	first, body, found := bytes.Cut(b, []byte("\n"))
	sum := sha256.Sum256(body)
	switch version, want, _ := bytes.Cut(first, []byte(" ")); {
	case !found || string(version) != snapshotVersion:
		return Snapshot{}, fmt.Errorf("it does not begin with %q", snapshotVersion)
	case string(want) != hex.EncodeToString(sum[:]):
		return Snapshot{}, errors.New("its checksum is wrong")
	}
	var s Snapshot
	if err := json.Unmarshal(body, &s); err != nil {
		return Snapshot{}, err
	}
	return s, nil
}

// ReadSnapshot reads the file of a node. There may be none yet: the error is os.ErrNotExist then.
func ReadSnapshot(path, node string) (Snapshot, error) {
	file, err := os.Open(path)
	if err != nil {
		return Snapshot{}, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, snapshotLimit+1))
	if err != nil {
		return Snapshot{}, err
	}
	if len(b) > snapshotLimit {
		return Snapshot{}, fmt.Errorf("it is larger than %d bytes", snapshotLimit)
	}
	s, err := decodeSnapshot(b)
	if err == nil && s.Node != node {
		err = fmt.Errorf("it is of the node %q", s.Node)
	}
	return s, err
}

// Write replaces the file: whoever reads it at any moment, and after a crash, finds the one or the other whole.
func (s Snapshot) Write(path string) (err error) {
	b, err := s.encode()
	if err != nil {
		return err
	}
	folder := filepath.Dir(path)
	file, err := os.CreateTemp(folder, filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(file.Name()))
		}
	}()
	_, err = file.Write(b)
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
